"""Several engines behind one queue; one that fails costs its unanswered requests a second try, not the run.

Each replica takes the next request when it has capacity, so the slowest does not set the pace. A failed request, a
silent health check and a failed step of a weight update all take the replica out of service (`grpo_ds.engine.replicas`).
A restarted one needs the trainer's weights: `needs_weights` asks for a weight update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import (
    Carrier,
    EngineDown,
    EngineError,
    GenerationEngine,
    OnAnswer,
    RawRollout,
    Request,
    SamplingSpec,
)
from grpo_ds.engine.replicas import POLL_S, Replica, Replicas, State, background
from grpo_ds.engine.work import WorkQueue, check_answer

_SHARE = 0.75
"""Part of its equal share of a call's requests that a replica has in flight at once; the rest goes to the faster."""
_MAX_SEQUENCES = 1024
"""Responses in flight at one replica: more would only wait inside the server."""
_PROBE_S = 2.0
"""Seconds between health checks of a replica that generates."""


class EnginePool:
    """`config.replicas` engines as one; implements `GenerationEngine`."""

    def __init__(self, make: Callable[[int], GenerationEngine], config: EngineConfig) -> None:
        """make: a new engine, not started, for replica 0, 1, ...; called again at each restart."""
        self._config = config
        self._replicas = Replicas(make, config)
        self._replicas.handed_back = self._hand_back
        self._members: list[tuple[Replica, int]] = []
        """Replicas of the last weight update, with their life at its beginning."""
        self._queues: list[WorkQueue] = []
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
        return any(replica.engine.alive() for replica, _ in self._replicas.running())

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
        queue, lock = WorkQueue(requests, spec, on_answer), self._replicas.lock
        with lock:
            self._replicas.raise_fatal()
            self._queues.append(queue)
            self._set_to_work(queue)
        try:
            self._wait_for(queue)
        finally:
            with lock:
                queue.closed = True
                self._queues.remove(queue)
                self._replicas.work.notify_all()
        return queue.in_order()

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

    def _set_to_work(self, queue: WorkQueue) -> None:
        """Gives the queue to the replicas in service that do not work on it yet. Under the lock."""
        serving = self._replicas.serving()
        for replica, life in serving:
            if (replica.index, life) in queue.takers:
                continue
            queue.takers.add((replica.index, life))
            background(self._probe, replica, life, queue)
            for _ in range(_slots(len(queue), queue.spec.n, len(serving))):
                background(self._serve, replica, life, queue)

    def _wait_for(self, queue: WorkQueue) -> None:
        with self._replicas.lock:
            while not queue.complete:
                self._replicas.raise_fatal()
                if self._replicas.closed:
                    raise EngineError("the engine was closed while it generated")
                self._check_probes()
                if not queue.on_answer and not self._replicas.serving():
                    raise EngineDown("no engine replica is in service; a restart is under way", queue.finished)
                self._replicas.changed.wait(POLL_S)

    def _hand_back(self, replica: Replica, life: int) -> int:
        return sum(queue.hand_back((replica.index, life)) for queue in self._queues)

    def _serve(self, replica: Replica, life: int, queue: WorkQueue) -> None:
        """Answers one request after the other until the call is over or the replica fails."""
        taker, oldest = (replica.index, life), self._version
        while True:
            with self._replicas.lock:
                while not (over := queue.closed or replica.life != life) and (
                    replica.state is not State.SERVING or (request := queue.take(taker)) is None
                ):
                    self._replicas.work.wait()  # for the end of an update, or others that fail and hand theirs back
                engine = replica.engine
            if over:
                return
            assert request is not None
            try:
                (rollouts,) = engine.generate([request], queue.spec)
                check_answer(request, rollouts, queue.spec, oldest, self._version, aborted=queue.aborted)
            except Exception as error:  # whatever it was, this replica cannot be trusted with requests
                self._replicas.quarantine(replica, life, error)
                return
            with self._replicas.lock:
                if queue.answer(taker, request, rollouts) and queue.complete:
                    self._replicas.changed.notify_all()

    def _probe(self, replica: Replica, life: int, queue: WorkQueue) -> None:
        """Asks the replica for its version now and then."""
        pause = min(_PROBE_S, self._config.stall_timeout_s / 4)
        due = time.monotonic() + pause
        while True:
            with self._replicas.lock:
                while not (over := queue.closed or replica.life != life) and (
                    replica.state is not State.SERVING or time.monotonic() < due
                ):
                    self._replicas.work.wait(pause)
                if over:
                    return
                engine, updates = replica.engine, self._updates
                replica.probed_at = replica.probed_at or time.monotonic()
            try:
                self._require_version(engine)
            except Exception as error:  # as in `_serve`
                with self._replicas.lock:
                    meanwhile = updates != self._updates
                if not meanwhile:  # an update sees for itself which replicas fail
                    self._replicas.quarantine(replica, life, error)
                    return
            with self._replicas.lock:
                if replica.life == life:
                    replica.probed_at = None
            due = time.monotonic() + pause

    def _check_probes(self) -> None:
        limit = self._config.stall_timeout_s
        for replica, life in self._replicas.running():
            if replica.state is not State.SERVING or replica.probed_at is None:
                continue
            if time.monotonic() - replica.probed_at > limit:
                silent = EngineError(f"no answer to a health check within {limit:g} s (engine.stall_timeout_s)")
                self._replicas.quarantine(replica, life, silent)

    def sleep(self) -> None:
        self._each("sleep", lambda engine: engine.sleep())

    # ---- weight updates ----

    def pause(self) -> None:
        """Those that are up take part in the update; waits for one when none is.

        When all of them fail during the update it ends without an error, and `needs_weights` asks for another one.
        """
        self._members = self._replicas.wait_running()
        self._updates += 1
        self._enter(State.BARE)
        self._each("pause", lambda engine: engine.pause())

    def begin_update(self, names: Sequence[str]) -> None:
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
        self._enter(State.SERVING)

    def version(self) -> int:
        """The version of all replicas in service; one that reports another is taken out."""
        self._each("version", self._require_version)
        return self._version

    def _require_version(self, engine: GenerationEngine) -> None:
        if (found := engine.version()) != self._version:
            raise EngineError(f"it reports policy version {found} where it was given {self._version}")

    def _enter(self, state: State) -> None:
        with self._replicas.lock:
            for replica, life in self._members:
                if replica.life == life:
                    replica.state = state
                    replica.probed_at = replica.probed_at and time.monotonic()  # an update may have kept it waiting
            for queue in self._queues:
                self._set_to_work(queue)
            self._replicas.work.notify_all()

    def _each(self, step: str, call: Callable[[GenerationEngine], object]) -> None:
        """Calls all members of the last update at once; who fails or misses the deadline is taken out of service."""
        limit = self._config.stall_timeout_s
        outcomes: dict[int, Exception | None] = {}

        def attempt(replica: Replica, engine: GenerationEngine) -> None:
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
        silent = EngineError(f"`{step}` was not done within {limit:g} s (engine.stall_timeout_s)")
        for replica, life, _ in members:
            if (error := outcomes.get(replica.index, silent)) is not None:
                self._replicas.quarantine(replica, life, error)
        self._replicas.raise_fatal()


def _slots(requests: int, n: int, replicas: int) -> int:
    """Requests that a replica has in flight at once."""
    share = requests if replicas == 1 else math.ceil(_SHARE * requests / replicas)
    return max(1, min(share, _MAX_SEQUENCES // n))
