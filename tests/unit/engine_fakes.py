"""Engines without a model, which can be killed, stopped, or made to answer rubbish; and the trainer's side of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import EngineError, RawRollout, Request, SamplingSpec
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
        self.closed = False
        self.dead = False
        self.stopped = False
        self.rubbish: Rubbish | None = None
        self.one_at_a_time = threading.Lock()
        self.before_answer: Callable[[], None] = lambda: None

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

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[RawRollout]]:
        (request,) = requests
        with self.diary.lock:
            self.diary.asked.append((self.index, request.request_id))
        with self.one_at_a_time:
            time.sleep(self.seconds)
        self.before_answer()
        self._reach()
        if self.open:
            raise AssertionError("asked to generate in the middle of a weight update")
        answer = answer_to(request, spec, self.held)
        return [self.rubbish(answer) if self.rubbish else answer]

    def pause(self) -> None:
        self._reach()

    def begin_update(self, names: Sequence[str]) -> None:
        self._reach()
        self.open = True

    def update_bucket(self, bucket: dict[str, Any]) -> None:
        self._reach()

    def finish_update(self, version: int) -> None:
        self._reach()
        self.held, self.open = version, False

    def flush_cache(self) -> None:
        self._reach()

    def resume(self) -> None:
        self._reach()

    def version(self) -> int:
        self._reach()
        return self.held


def answer_to(request: Request, spec: SamplingSpec, version: int) -> list[RawRollout]:
    return [RawRollout((request.seed + k,), (-1.0,), "stop", (VersionSpan(version, 0, 1),)) for k in range(spec.n)]


def without_logprobs(answer: list[RawRollout]) -> list[RawRollout]:
    return [replace(rollout, logprobs=()) for rollout in answer]


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


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)
