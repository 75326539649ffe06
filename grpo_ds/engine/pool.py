"""A node's servers behind one queue; one that fails costs its unanswered requests a second try, not the run.

Each replica takes the next request when it has capacity, so the slowest does not set the pace. A failed request, a
silent health check and a failed step of a weight update all take the replica out of service (`grpo_ds.engine.replicas`).
A restarted one needs the trainer's weights: `needs_weights` asks for a weight update.

Whoever calls `generate` hands the requests out; a server's answers arrive in the one thread of its event loop. So 1,024
requests in flight are no threads, and a file descriptor each (`grpo_ds.engine.http.connections`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import (
    UNKNOWN_VERSION,
    Carrier,
    EngineDown,
    EngineError,
    OnAnswer,
    RawRollout,
    Request,
    SamplingSpec,
    ServerLike,
)
from grpo_ds.engine.devices import server_count
from grpo_ds.engine.http import connections
from grpo_ds.engine.replicas import POLL_S, Replica, Replicas, State, background
from grpo_ds.engine.work import WorkQueue, check_answer

_SHARE = 0.75
"""Part of its equal share of a call's requests that a replica has in flight at once; the rest goes to the faster."""
_MAX_SEQUENCES = 1024
"""Responses in flight at one replica: more would only wait inside the server."""
_SHARE_OF_UPDATE = 0.5
"""Part of an update's remaining time that one step may take."""
_PROBE_S = 2.0
"""Seconds between health checks of a replica that generates."""


class EnginePool:
    """All servers of a node as one engine; implements `GenerationEngine`."""

    def __init__(
        self, make: Callable[[int], ServerLike], config: EngineConfig, update_timeout_s: float = math.inf
    ) -> None:
        """make: a new engine, not started, for replica 0, 1, ...; called again at each restart.

        update_timeout_s: after which whoever updates the weights gives up, counted from `begin_update`.
        """
        self._config = config
        self._update_timeout_s = update_timeout_s
        self._update_ends = math.inf
        """When that is, on the monotonic clock; infinite outside of an update."""
        self._replicas = Replicas(make, config)
        self._replicas.handed_back = self._hand_back
        self._members: list[tuple[Replica, int]] = []
        """Replicas of the last weight update, with their life at its beginning."""
        self._queues: list[WorkQueue] = []
        self._connections = connections(server_count(config))
        self._version = 0
        self._updates = 0
        """Weight updates begun."""

    def start(self) -> None:
        self._replicas.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        self._replicas.wait_ready(self._config.start_timeout_s if timeout_s is None else timeout_s)
        self._members = self._replicas.serving()

    def close(self) -> None:
        self._replicas.close()

    def alive(self) -> bool:
        """Whether enough of it lives: all replicas where none may fail, else any."""
        living = [replica.engine.alive() for replica in self._replicas.all]
        return any(living) if self._config.max_restarts else all(living)

    def needs_weights(self) -> bool:
        """Whether a weight update would bring a replica into service (it then waits for one to come up, if need be)."""
        with self._replicas.lock:
            self._replicas.raise_fatal()
            states = {replica.state for replica in self._replicas.all}
        return State.BARE in states or State.SERVING not in states

    def take_counts(self) -> dict[str, int]:
        """Failures since the last call (`grpo_ds.engine.replicas.COUNTS`)."""
        return self._replicas.take_counts()

    # ---- generation ----

    def generate(
        self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None
    ) -> list[list[RawRollout]]:
        """As in `GenerationEngine`. When no replica is in service any more, a call with on_answer waits for the next
        weight update, and one without raises EngineDown with what is finished.
        """
        if not requests:
            return []
        queue = WorkQueue(requests, spec, on_answer)
        with self._replicas.lock:
            self._replicas.raise_fatal()
            self._queues.append(queue)
            try:
                while not queue.complete:
                    self._attend(queue)
                    if not queue.complete:
                        self._replicas.changed.wait(POLL_S)
            finally:
                self._queues.remove(queue)
            self._replicas.raise_fatal()
        return queue.in_order()

    def _attend(self, queue: WorkQueue) -> None:
        """What whoever waits for answers does: hands requests out, and sees to it that there is somebody to answer."""
        self._check_health()
        self._replicas.raise_fatal()
        if self._replicas.closed:
            raise EngineError("the engine was closed while it generated")
        self._hand_out(queue)
        if not queue.on_answer and not self._replicas.serving():
            raise EngineDown("no engine replica is in service; a restart is under way", queue.finished)

    def abort(self) -> None:
        """As in `GenerationEngine`; a replica that does not obey is taken out of service."""
        with self._replicas.lock:
            aborted = list(self._queues)
            for queue in aborted:
                queue.abort()
        deadline = time.monotonic() + 2 * self._config.stall_timeout_s
        while True:
            # Again and again: a request may be on its way to its replica.
            self._each("abort", lambda engine: engine.abort())
            with self._replicas.lock:
                self._replicas.changed.notify_all()
                if self._replicas.changed.wait_for(lambda: all(queue.complete for queue in aborted), POLL_S):
                    return
            if time.monotonic() > deadline:
                raise EngineError(f"aborted requests were not answered within {2 * self._config.stall_timeout_s:g} s")

    def _hand_out(self, queue: WorkQueue) -> None:
        """Gives each replica in service as many requests as it may have in flight. Under the lock."""
        serving = self._replicas.serving()
        slots = _slots(len(queue), queue.spec.n, len(serving))
        for replica, life in serving:
            taker = (replica.index, life)
            free = self._connections - sum(other.held(taker) for other in self._queues)
            for _ in range(min(slots - queue.held(taker), free)):
                if replica.life != life or (request := queue.take(taker)) is None:
                    break
                self._ask(replica, life, queue, request)

    def _ask(self, replica: Replica, life: int, queue: WorkQueue, request: Request) -> None:
        oldest = self._version
        try:
            asked = replica.engine.submit(request, queue.spec)
        except Exception as error:  # whatever it was, this replica cannot be trusted with requests
            self._replicas.quarantine(replica, life, error)
            return
        asked.add_done_callback(lambda done: self._answered(replica, life, queue, request, oldest, done))

    def _answered(
        self,
        replica: Replica,
        life: int,
        queue: WorkQueue,
        request: Request,
        oldest: int,
        answer: Future[list[RawRollout]],
    ) -> None:
        try:
            rollouts = answer.result()
            check_answer(request, rollouts, queue.spec, oldest, self._version, aborted=queue.aborted)
        except Exception as error:  # as in `_ask`
            self._replicas.quarantine(replica, life, error)
            return
        with self._replicas.lock:
            if queue.answer((replica.index, life), request, rollouts):
                self._replicas.changed.notify_all()

    def _hand_back(self, replica: Replica, life: int) -> int:
        return sum(queue.hand_back((replica.index, life)) for queue in self._queues)

    def _check_health(self) -> None:
        """Has each replica in service asked for its version now and then; one that stays silent is taken out."""
        now, limit = time.monotonic(), self._config.stall_timeout_s
        for replica, life in self._replicas.serving():
            if replica.probed_at is None:
                if now >= replica.probe_due:
                    replica.probed_at = now
                    background(self._probe, replica, life, replica.engine, self._updates)
            elif now - replica.probed_at > limit:
                silent = EngineError(f"no answer to a health check within {limit:g} s (engine.stall_timeout_s)")
                self._replicas.quarantine(replica, life, silent)

    def _probe(self, replica: Replica, life: int, engine: ServerLike, updates: int) -> None:
        failure = None
        try:
            self._require_version(engine)
        except Exception as error:  # as in `_ask`
            failure = error
        with self._replicas.lock:
            if replica.life != life:
                return
            replica.probed_at = None
            replica.probe_due = time.monotonic() + min(_PROBE_S, self._config.stall_timeout_s / 4)
            meanwhile = updates != self._updates  # an update sees for itself which replicas fail
        if failure is not None and not meanwhile:
            self._replicas.quarantine(replica, life, failure)

    def sleep(self) -> int:
        return self._each("sleep", lambda engine: engine.sleep())

    # ---- weight updates ----

    def pause(self) -> None:
        """Those that are up take part in the update; waits for one when none is.

        When all of them fail during the update it ends without an error, and `needs_weights` asks for another one.
        """
        self._members = self._replicas.wait_running()
        self._update_ends = math.inf
        self._updates += 1
        self._enter(State.BARE)
        self._each("pause", lambda engine: engine.pause())

    def begin_update(self, names: Sequence[str]) -> None:
        self._update_ends = time.monotonic() + self._update_timeout_s
        self._each("begin_update", lambda engine: engine.begin_update(names))

    def update_bucket(self, bucket: dict[str, Any], carrier: Carrier | None = None) -> None:
        self._each("update_bucket", lambda engine: engine.update_bucket(bucket, carrier))

    def finish_update(self, version: int) -> None:
        self._each("finish_update", lambda engine: engine.finish_update(version))
        self._version = version

    def flush_cache(self) -> None:
        self._each("flush_cache", lambda engine: engine.flush_cache())

    def resume(self) -> None:
        self._each("resume", lambda engine: engine.resume())
        self._update_ends = math.inf
        self._enter(State.SERVING)

    def version(self) -> int:
        """The version of all replicas in service; one that reports another is taken out."""
        self._each("version", self._require_version)
        return self._version

    def reported_versions(self) -> list[int]:
        """What each replica itself says; UNKNOWN_VERSION for those out of service."""
        with self._replicas.lock:
            engines = [replica.engine if replica.state is State.SERVING else None for replica in self._replicas.all]
        return [engine.version() if engine else UNKNOWN_VERSION for engine in engines]

    def _require_version(self, engine: ServerLike) -> None:
        if (found := engine.version()) != self._version:
            raise EngineError(f"it reports policy version {found} where it was given {self._version}")

    def _enter(self, state: State) -> None:
        with self._replicas.lock:
            for replica, life in self._members:
                if replica.life == life:
                    replica.state = state
                    replica.probed_at = replica.probed_at and time.monotonic()  # an update may have kept it waiting
            self._replicas.changed.notify_all()

    def _patience(self) -> tuple[float, str]:
        """(seconds that a step may take, the setting they come from).

        In an update that can go on without a replica, one that hangs takes half of the remaining time at most, so that
        the others, of which more may hang, can still finish it.
        """
        limit = self._config.stall_timeout_s
        share = _SHARE_OF_UPDATE * max(0.0, self._update_ends - time.monotonic())
        if self._config.max_restarts == 0 or limit <= share:
            return limit, "engine.stall_timeout_s"
        return share, f"{_SHARE_OF_UPDATE:g} of what was left of sync.timeout_s"

    def _each(self, step: str, call: Callable[[ServerLike], object]) -> int:
        """Calls all members of the last update at once; who fails or misses the deadline is taken out of service.

        Returns how many did not.
        """
        limit, key = self._patience()
        outcomes: dict[int, Exception | None] = {}

        def attempt(replica: Replica, engine: ServerLike) -> None:
            try:
                call(engine)
                outcomes[replica.index] = None
            except Exception as error:  # judged below
                outcomes[replica.index] = error

        with self._replicas.lock:
            members = [(replica, life, replica.engine) for replica, life in self._members if replica.life == life]
        threads = [background(attempt, replica, engine) for replica, _, engine in members]
        deadline = time.monotonic() + limit
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        silent = EngineError(f"`{step}` was not done within {limit:.3g} s ({key})")
        failed = [
            (replica, life, error) for replica, life, _ in members if (error := outcomes.get(replica.index, silent))
        ]
        for replica, life, error in failed:
            self._replicas.quarantine(replica, life, error)
        self._replicas.raise_fatal()
        return len(members) - len(failed)


def _slots(requests: int, n: int, replicas: int) -> int:
    """Requests of a call that each of so many replicas may have in flight at once."""
    share = requests if replicas <= 1 else math.ceil(_SHARE * requests / replicas)
    return max(1, min(share, _MAX_SEQUENCES // n))
