"""Engines without a model, which can be killed, stopped, or made to answer rubbish; and the trainer's side of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import EngineError, OnAnswer, RawRollout, Request, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from grpo_ds.types import VersionSpan

Rubbish = Callable[[list[RawRollout]], list[RawRollout]]


@dataclass
class Diary:
    """What all engines of a test did."""

    asked: list[tuple[int, str]] = field(default_factory=list)
    """(replica, request_id) of each generate call."""
    made: list[FakeEngine] = field(default_factory=list)
    fails_to_start: int = 0
    """How many restarts fail."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    must_ask: frozenset[int] = frozenset()
    """Replicas that must have been asked something before any other answers: thread luck decides nothing."""

    def wait_until_asked(self) -> None:
        """Waits until all of must_ask were asked."""
        wait_for(
            f"requests to replicas {set(self.must_ask)}", lambda: self.must_ask <= {r for r, _ in list(self.asked)}
        )


class FakeEngine:
    """Token k of a request's answers is its seed + k; takes `seconds` a request."""

    def __init__(self, index: int, diary: Diary, seconds: float = 0.0) -> None:
        self.index = index
        self.diary = diary
        self.seconds = seconds
        self.restarted = any(engine.index == index for engine in diary.made)
        diary.made.append(self)
        self.held = 0
        self.open = False
        self.paused = False
        self.aborts = 0
        self.holds: Callable[[Request], bool] = lambda request: False
        """Which requests are not answered yet."""
        self.closed = False
        self.dead = False
        self.stopped = False
        self.rubbish: Rubbish | None = None
        self.one_at_a_time = threading.Lock()
        self.before_answer: Callable[[], None] = lambda: None
        """Called for one request after the other."""

    def _reach(self) -> None:
        """As a request over HTTP: refused by a dead server, not answered by a stopped one until that is killed."""
        while self.stopped and not self.dead:
            time.sleep(0.005)
        if self.dead:
            raise EngineError(f"server {self.index} is gone")

    def start(self) -> None:
        pass

    def wait_ready(self, timeout_s: float | None = None) -> None:
        if self.restarted and self.diary.fails_to_start > 0:
            self.diary.fails_to_start -= 1
            raise EngineError("it did not start")
        self._reach()

    def close(self) -> None:
        self.closed = self.dead = True

    def alive(self) -> bool:
        return not self.dead

    def generate(
        self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None
    ) -> list[list[RawRollout]]:
        (request,) = requests
        began, flight = self.held, self.aborts
        with self.diary.lock:
            self.diary.asked.append((self.index, request.request_id))
        self.diary.wait_until_asked()
        with self.one_at_a_time:
            time.sleep(self.seconds)
            self.before_answer()
        while (self.paused or self.holds(request)) and flight == self.aborts and not self.dead:
            time.sleep(0.002)
        self._reach()
        if flight != self.aborts:
            return [[RawRollout((7,), (-1.0,), "abort", (VersionSpan(began, 0, 1),))] * spec.n]
        if self.open:
            raise AssertionError("asked to generate in the middle of a weight update")
        answer = answer_to(request, spec, self.held, began)
        return [self.rubbish(answer) if self.rubbish else answer]

    def submit(self, request: Request, spec: SamplingSpec) -> Future[list[RawRollout]]:
        future: Future[list[RawRollout]] = Future()

        def answer() -> None:
            try:
                future.set_result(self.generate([request], spec)[0])
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=answer, daemon=True).start()
        return future

    def abort(self) -> None:
        self._reach()
        self.aborts += 1

    def sleep(self) -> int:
        self._reach()
        return 1

    def pause(self) -> None:
        self._reach()
        self.paused = True

    def begin_update(self, names: Sequence[str]) -> None:
        self._reach()
        self.open = True

    def update_bucket(self, bucket: dict[str, Any], carrier: Any = None) -> None:
        self._reach()

    def finish_update(self, version: int) -> None:
        self._reach()
        self.held, self.open = version, False

    def flush_cache(self) -> None:
        self._reach()

    def resume(self) -> None:
        self._reach()
        self.paused = False

    def version(self) -> int:
        self._reach()
        return self.held


def answer_to(request: Request, spec: SamplingSpec, version: int, began: int | None = None) -> list[RawRollout]:
    """One token a response; one more of policy `began` before it, when that was another one."""
    spans: tuple[VersionSpan, ...] = (VersionSpan(version, 0, 1),)
    if began is not None and began != version:
        spans = (VersionSpan(began, 0, 1), VersionSpan(version, 1, 2))
    size = len(spans)
    return [RawRollout((request.seed + k,) * size, (-1.0,) * size, "stop", spans) for k in range(spec.n)]


def without_logprobs(answer: list[RawRollout]) -> list[RawRollout]:
    return [replace(rollout, logprobs=()) for rollout in answer]


def cut_off(answer: list[RawRollout]) -> list[RawRollout]:
    """The first response as a server gives it whose core is ended in the middle: some tokens, and HTTP 200."""
    return [replace(answer[0], finish_reason="abort"), *answer[1:]]


def publish(pool: EnginePool, version: int, between: Callable[[], None] = lambda: None) -> None:
    """A weight update as the trainer makes it; `between` happens in its middle."""
    pool.pause()
    pool.begin_update(["w"])
    between()
    pool.update_bucket({})
    pool.finish_update(version)
    pool.flush_cache()
    assert pool.version() == version
    pool.resume()


def make_pool(diary: Diary, replicas: int = 2, max_restarts: int = 5, **config: float) -> EnginePool:
    """A pool that is ready; its engines are the first `replicas` of diary.made."""
    settings = EngineConfig(
        replicas=replicas, max_restarts=max_restarts, start_timeout_s=5, stall_timeout_s=config.pop("stall", 5.0)
    )
    pool = EnginePool(lambda index: FakeEngine(index, diary, **config), settings)
    pool.start()
    pool.wait_ready()
    return pool


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)


class OneRank:
    """The only rank of the only node."""

    node, nodes = 0, 1

    def all_gather(self, value: Any, what: str) -> list[Any]:
        return [value]


class Meeting:
    """All-gather between threads that play ranks, each the lead of a node."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=100)
        self._values: list[Any] = [None] * world

    def rank(self, number: int) -> Any:
        meeting = self

        class Rank:
            node, nodes = number, len(meeting._values)

            def all_gather(self, value: Any, what: str) -> list[Any]:
                meeting._values[number] = value
                meeting._barrier.wait()
                values = list(meeting._values)
                meeting._barrier.wait()
                return values

        return Rank()

    def play(self, part: Callable[[int, Any], None]) -> None:
        """Runs part(number, rank) of all ranks at once; raises what the first of them raised."""
        failures: list[BaseException] = []

        def run(number: int) -> None:
            try:
                part(number, self.rank(number))
            except BaseException as error:  # raised below
                failures.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(self._values))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        if failures:
            raise failures[0]
        assert not any(thread.is_alive() for thread in threads)
