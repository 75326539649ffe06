"""Requests under way while something happens to their engine: they are aborted, or the weights change under them."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import EngineDown, EngineError, RawRollout, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from tests.engine.bench import Bench, assert_logprobs_match, requests
from tests.engine.conftest import SGLANG
from tests.engine.test_process import command_of, descendants
from tests.engine.test_update import Sender, perturb, publish

GREEDY = SamplingSpec(n=1, max_tokens=8, temperature=0.0)


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender(2**20)
    yield made
    os.close(made.fd)


@pytest.fixture(params=["vllm_tied", pytest.param("sglang_tied", marks=SGLANG)])
def served(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.getfixturevalue(request.param)
    return found


def computing(engine: Any) -> psutil.Process:
    """The process that runs the scheduler and the model; the web server is another one."""
    titles = ("sglang::schedul", "VLLM::EngineCor")  # the kernel cuts names to 15 characters
    family = descendants(engine._server.process.pid)
    (found,) = [p for p in family if p.name()[:15].startswith(titles) or "VLLM::EngineCore" in command_of(p)]
    return found


MANY = 160
"""Requests of 4 responses each: several times what a server computes at once, so most wait when the first is answered."""


@contextmanager
def under_way(bench: Bench, spec: SamplingSpec) -> Iterator[Future[list[list[RawRollout]]]]:
    """`MANY` requests of which one is answered, and others have begun."""
    first = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(bench.engine.generate, requests(MANY), spec, lambda request, rollouts: first.set())
        assert first.wait(60), "none of the requests was answered within 60 s"
        time.sleep(0.3)  # hf begins a request when the one before is answered
        yield running


def test_an_abort_ends_running_requests_with_the_tokens_they_have(bench: Bench) -> None:
    spec = SamplingSpec(n=4, max_tokens=200)
    with under_way(bench, spec) as running:
        begun = time.monotonic()
        bench.engine.abort()
        took = time.monotonic() - begun
        answers = running.result(timeout=5)
    assert took < 20, "the rest would take longer"
    cut = [rollout for rollouts in answers for rollout in rollouts if rollout.finish_reason == "abort"]
    assert len(cut) > MANY * 4 / 2, "most were under way or waiting"
    assert any(rollout.token_ids for rollout in cut), "some had begun"
    for request, rollouts in zip(requests(MANY), answers, strict=True):
        assert len(rollouts) == 4
        for rollout in rollouts:
            assert len(rollout.token_ids) <= 200
            covered = [position for span in rollout.spans for position in range(span.start, span.end)]
            assert covered == list(range(len(rollout.token_ids)))
            if rollout.token_ids and request.request_id in ("p0", "p20", "p47"):
                assert_logprobs_match(bench, request, rollout, 1.0)
    for request, (rollout,) in zip(requests(2), bench.engine.generate(requests(2), GREEDY), strict=True):
        assert rollout.finish_reason == "length" and len(rollout.token_ids) == 8
        assert_logprobs_match(bench, request, rollout, 1.0)


def test_an_abort_of_an_idle_engine_is_nothing(bench: Bench) -> None:
    begun = time.monotonic()
    bench.engine.abort()
    assert time.monotonic() - begun < 2
    ((rollout,),) = bench.engine.generate(requests(1), GREEDY)
    assert rollout.finish_reason == "length"


def test_paused_requests_can_be_aborted(served: Bench) -> None:
    with under_way(served, SamplingSpec(n=4, max_tokens=200)) as running:
        served.engine.pause()
        try:
            served.engine.abort()
            answers = running.result(timeout=5)
        finally:
            served.engine.resume()
    assert any(rollout.finish_reason == "abort" for rollouts in answers for rollout in rollouts)
    ((rollout,),) = served.engine.generate(requests(1), GREEDY)
    assert rollout.finish_reason == "length"


def test_requests_made_while_paused_can_be_aborted(served: Bench) -> None:
    """Nothing computes, so none of them can be answered but by the abort."""
    engine = served.engine
    engine.pause()
    with ThreadPoolExecutor(1) as threads:
        try:
            running = threads.submit(engine.generate, requests(4), SamplingSpec(n=2, max_tokens=50))
            time.sleep(1)  # they have reached the server, though not surely: an abort is repeated
            assert not running.done()
            begun = time.monotonic()
            engine.abort()
            took = time.monotonic() - begun
            answers = running.result(timeout=5)
        finally:
            engine.resume()
    assert took < 20, "long before the abort's own deadline"
    assert [(r.finish_reason, r.token_ids) for rollouts in answers for r in rollouts] == [("abort", ())] * 8
    ((rollout,),) = engine.generate(requests(1), GREEDY)
    assert rollout.finish_reason == "length" and len(rollout.token_ids) == 8


def test_requests_made_while_paused_are_answered_after_it_under_the_new_policy(served: Bench, sender: Sender) -> None:
    engine = served.engine
    perturb(served.model, 33)
    with ThreadPoolExecutor(1) as threads:
        engine.pause()
        try:
            running = threads.submit(engine.generate, requests(4), SamplingSpec(n=2, max_tokens=20))
            time.sleep(1)
            publish(served, sender, 33)
        finally:
            engine.resume()
        answers = running.result(timeout=60)
    for request, rollouts in zip(requests(4), answers, strict=True):
        for rollout in rollouts:
            assert [span.version for span in rollout.spans] == [33]
            assert_logprobs_match(served, request, rollout, 1.0)


def test_requests_in_flight_go_on_under_the_new_policy(served: Bench, sender: Sender) -> None:
    engine = served.engine
    started = time.monotonic()
    engine.generate(requests(8, seed=500), SamplingSpec(n=1, max_tokens=200, temperature=0.0))
    wait = (time.monotonic() - started) / 3
    # Other work on the machine makes one call slower than the next: then the wait was too long, and half of it is tried.
    assert any(switches(served, sender, 31 + k, wait / 2**k) for k in range(5)), "the weights came after every request"


def switches(served: Bench, sender: Sender, version: int, wait_s: float) -> int:
    """How many requests went on under `version`, published `wait_s` after they began; each token is its policy's."""
    engine, old_version, old = served.engine, served.engine.version(), copy.deepcopy(served.model)
    engine.flush_cache()
    asked = requests(8, seed=500)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(engine.generate, asked, SamplingSpec(n=1, max_tokens=200, temperature=0.0))
        time.sleep(wait_s)
        perturb(served.model, version)
        publish(served, sender, version)
        answers = running.result()
    switched = 0
    for request, (rollout,) in zip(asked, answers, strict=True):
        switched += [span.version for span in rollout.spans] == [old_version, version]
        for span in rollout.spans:
            policy = Bench(engine, old if span.version == old_version else served.model)
            argmax = policy.logits(request.prompt_token_ids, rollout.token_ids).argmax(-1).tolist()
            assert list(rollout.token_ids[span.start : span.end]) == argmax[span.start : span.end]
    return switched


def test_an_engine_sleeps_until_the_next_publication(served: Bench, sender: Sender) -> None:
    """The order of calls that a GPU needs, on a server whose CPU frees nothing: it ends up awake, with new weights."""
    engine = served.engine
    with under_way(served, SamplingSpec(n=4, max_tokens=200)) as running:
        with pytest.raises(EngineError, match="cannot sleep while requests are in flight"):
            engine.sleep()
        engine.abort()
        running.result()
    engine.sleep()
    with pytest.raises(EngineError, match="sleeps since its last generation: publish weights first"):
        engine.generate(requests(1), GREEDY)
    perturb(served.model, 32)
    publish(served, sender, 32)
    ((rollout,),) = engine.generate(requests(1), GREEDY)
    assert [span.version for span in rollout.spans] == [32]
    assert_logprobs_match(served, requests(1)[0], rollout, 1.0)


def test_a_hung_scheduler_is_not_covered_up_by_its_web_server(served: Bench) -> None:
    """While it is stopped no version is answered, though the web server could; then it goes on where it was."""
    engine: Any = served.engine
    scheduler, before = computing(engine), engine.version()
    scheduler.suspend()
    try:
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(engine.version)
            time.sleep(5)
            covered_up = asked.done()
            scheduler.resume()
            assert asked.result(timeout=60) == before
        assert not covered_up
    finally:
        scheduler.resume()


class Lent:
    """The session's server, as a pool has it that may neither end nor start it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def start(self) -> None:
        pass

    def wait_ready(self, timeout_s: float | None = None) -> None:
        pass

    def close(self) -> None:
        pass


def test_what_somebody_else_aborts_at_the_server_is_no_answer(served: Bench, sender: Sender) -> None:
    server: Any = served.engine
    pool = EnginePool(lambda replica: Lent(server), EngineConfig(max_restarts=1))
    pool.wait_ready()
    publish(Bench(pool, served.model), sender, 34)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.generate, requests(8), SamplingSpec(n=4, max_tokens=200))
        time.sleep(0.5)
        server._abort(30.0)  # the route that anybody with the key may post to
        with pytest.raises(EngineDown) as down:
            running.result(timeout=60)
    reasons = {rollout.finish_reason for rollouts in down.value.finished.values() for rollout in rollouts}
    assert reasons <= {"stop", "length"} and len(down.value.finished) < 8
    assert pool.take_counts()["quarantined"] == 1
