"""Servers that may fail: takes a broken one out of service, ends its processes, and restarts it in the background.

One of engine.urls is not ours to restart: it is joined anew as soon as it answers its health check. The policy's weights
live in the trainer, so a replica that is back stays BARE until the next weight update.

With engine.sleep a restart waits for the beginning of that update: at any other time the trainer may hold the memory.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import EngineError, ServerLike
from grpo_ds.engine.devices import server_count

COUNTS = ("quarantined", "restarts", "redone_requests")
"""What is counted: replicas taken out of service, replicas that came back, requests handed back."""
POLL_S = 0.2
_CLOSE_S = 60.0
"""Seconds in which a replica must have been closed."""


class State(Enum):
    DOWN = "down"
    """Being closed and restarted, or waited for."""
    BARE = "bare"
    """Up, without the current weights."""
    SERVING = "serving"


@dataclass(eq=False)
class Replica:
    """One engine after the other, each under the same number."""

    index: int
    name: str
    """In messages."""
    engine: ServerLike
    state: State = State.DOWN
    life: int = 0
    """Counts failures: what was begun in an earlier life has no say any more."""
    probed_at: float | None = None
    """When the health check that is not answered yet was made."""
    probe_due: float = 0.0
    """When the next one is to be made."""


class Replicas:
    """The servers of a node under supervision. Fields of a replica are read and written under `lock`."""

    def __init__(self, make: Callable[[int], ServerLike], config: EngineConfig) -> None:
        self._make = make
        self._config = config
        names = [f"engine {url}" for url in config.urls] or [f"engine replica {k}" for k in range(config.replicas)]
        self.all = [Replica(index, names[index], make(index)) for index in range(server_count(config))]
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        """A replica's state changed, or something was answered."""
        self.handed_back: Callable[[Replica, int], int] = lambda replica, life: 0
        """Told under `lock` which replica failed, in which life; returns how many requests it had not answered."""
        self.closed = False
        self._may_start = not config.sleep
        self._failures = 0
        self._fatal: EngineError | None = None
        self._counts: Counter[str] = Counter()

    def start(self) -> None:
        """Begins to start them all."""
        for replica in self.all:
            replica.engine.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Waits for all of them; one that does not start at all is an error, whatever max_restarts is."""
        deadline = time.monotonic() + timeout_s
        for replica in self.all:
            replica.engine.wait_ready(max(0.0, deadline - time.monotonic()))
        with self.lock:
            for replica in self.all:
                replica.state = State.SERVING  # policy 0, as it was loaded

    def close(self) -> None:
        """Ends them all, and every restart."""
        with self.lock:
            self.closed = True
            engines = [replica.engine for replica in self.all]
            self.changed.notify_all()
        for thread in [background(engine.close) for engine in engines]:
            thread.join(_CLOSE_S)

    def running(self) -> list[tuple[Replica, int]]:
        """Those that are not DOWN, with their life."""
        with self.lock:
            return [(replica, replica.life) for replica in self.all if replica.state is not State.DOWN]

    def serving(self) -> list[tuple[Replica, int]]:
        """Those that hold the current weights, with their life."""
        with self.lock:
            return [(replica, replica.life) for replica in self.all if replica.state is State.SERVING]

    def wait_running(self) -> list[tuple[Replica, int]]:
        """Those that are up; waits while there is none, and with engine.sleep for all of them."""
        for replica, life in self.running():
            if not replica.engine.alive():
                self.quarantine(replica, life, EngineError("its process ended while nothing was asked of it"))
        timeout_s = 2 * self._config.start_timeout_s + _CLOSE_S
        deadline = time.monotonic() + timeout_s
        with self.lock:
            self._may_start = True
            self.changed.notify_all()
            try:
                while True:
                    self.raise_fatal()
                    running = self.running()
                    if len(running) == len(self.all) or (running and not self._config.sleep):
                        return running
                    if time.monotonic() > deadline:
                        raise EngineError(
                            f"{len(running)} of {len(self.all)} engine replicas came up again within {timeout_s:g} s "
                            "(engine.start_timeout_s)"
                        )
                    self.changed.wait(POLL_S)
            finally:
                self._may_start = not self._config.sleep

    def take_counts(self) -> dict[str, int]:
        """COUNTS since the last call."""
        with self.lock:
            counts, self._counts = self._counts, Counter()
        return {name: counts[name] for name in COUNTS}

    def raise_fatal(self) -> None:
        """Raises the failure after which no restart is allowed, if there was one."""
        if self._fatal is not None:
            raise self._fatal

    def quarantine(self, replica: Replica, life: int, cause: Exception) -> None:
        """Takes a replica out of service and has it restarted; once a life, whoever notices first."""
        with self.lock:
            if self.closed or replica.life != life:
                return
            self._counts["quarantined"] += 1
            self._counts["redone_requests"] += self.handed_back(replica, life)
            replica.life, replica.state, replica.probed_at = life + 1, State.DOWN, None
            restart = self._may_restart(replica, cause)
            self.changed.notify_all()
        if restart:
            background(self._restart, replica)

    def _may_restart(self, replica: Replica, cause: Exception) -> bool:
        """Counts a failure, and says it."""
        limit = self._config.max_restarts
        reason = f"{replica.name} failed: {cause}"
        with self.lock:
            self._failures += 1
            number = self._failures
            if number > limit:
                many = (
                    f"failure {number} of this node's engines exceeds engine.max_restarts ({limit}): " if limit else ""
                )
                self._fatal = self._fatal or EngineError(many + reason)
                self.changed.notify_all()
                return False
        fate = "waited for" if self._config.urls else "restarted"
        sys.stderr.write(f"grpo_ds: {reason.splitlines()[0][:300]}; it is {fate} ({number} of {limit})\n")
        sys.stderr.flush()
        return True

    def _restart(self, replica: Replica) -> None:
        while True:
            try:
                replica.engine.close()
                self._wait_for_turn()
                engine = self._make(replica.index)
                with self.lock:
                    if self.closed:
                        return
                    replica.engine = engine
                engine.start()
                engine.wait_ready()
                break
            except Exception as error:  # counted; the last one allowed ends the run
                if self.closed or not self._may_restart(replica, error):
                    return
        with self.lock:
            if not self.closed:
                replica.state = State.BARE
                self._counts["restarts"] += 1
                self.changed.notify_all()
                return
        engine.close()  # all were closed while this one started

    def _wait_for_turn(self) -> None:
        """Ends with the start of a weight update, or of the run's end."""
        with self.lock:
            while not self._may_start and not self.closed:
                self.changed.wait(POLL_S)


def background(work: Callable[..., object], *args: object) -> threading.Thread:
    """Runs work in a thread that does not keep the process from ending while it waits for a hung server."""
    thread = threading.Thread(target=work, args=args, daemon=True, name="engine-pool")
    thread.start()
    return thread
