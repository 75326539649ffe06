"""Requests beside the trainer, over engines that are paused, updated, told to abort, killed and restarted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grpo_ds.engine.base import EngineError, RawRollout, Request, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from grpo_ds.evaluate import EngineSampler
from grpo_ds.inflight import InFlight
from grpo_ds.types import Prompt, VersionSpan
from tests.unit.engine_fakes import (
    Diary,
    OneRank,
    cut_off,
    make_pool,
    publish,
    wait_for,
)
from tests.unit.test_collect_modes import recipe

SPEC = SamplingSpec(n=2, max_tokens=4)


@pytest.fixture
def diary() -> Iterator[Diary]:
    diary = Diary()
    yield diary
    for engine in diary.made:
        engine.close()


def prompts(*indices: int) -> list[Prompt]:
    return [Prompt(k, k, (1,), "p", {}) for k in indices]


def in_flight(pool: EnginePool, republish: Any = None, *, mode: str = "keep", greedy: bool = False) -> InFlight:
    sampler = EngineSampler(pool, recipe(mode), lambda ids: "", OneRank(), republish)  # type: ignore[arg-type]
    return InFlight(sampler, greedy_baseline=greedy)


def collected(running: InFlight, count: int) -> dict[int, Any]:
    """Answers by prompt, looked for until there are `count`."""
    found: dict[int, Any] = {}

    def look() -> bool:
        found.update({answer.prompt.index: answer for answer in running.answers(count - len(found))})
        return len(found) >= count

    wait_for(f"{count} answers", look)
    return found


def held(*indices: int) -> Callable[[Request], bool]:
    """Whether a request is of these prompts."""
    return lambda request: int(request.request_id.split("-")[-1]) in indices


def test_answers_are_taken_as_they_come_and_the_slow_ones_go_on(diary: Diary) -> None:
    pool = make_pool(diary)
    for engine in diary.made:
        engine.holds = held(1, 4)
    running = in_flight(pool)
    running.ask(prompts(*range(6)), 0)
    assert set(collected(running, 4)) == {0, 2, 3, 5}
    publish(pool, 1)  # the two that run are in its way no more than it is in theirs
    running.ask(prompts(6, 7), 1)
    assert set(collected(running, 2)) == {6, 7}
    for engine in diary.made:
        engine.holds = held()
    late = collected(running, 2)
    assert {a.train[0].spans for a in late.values()} == {(VersionSpan(0, 0, 1), VersionSpan(1, 1, 2))}
    assert Counter(name for _, name in diary.asked) == {
        **{f"train-0-{k}": 1 for k in range(6)},
        **{f"train-1-{k}": 1 for k in (6, 7)},
    }
    pool.close()
    running.close()
    assert not any(thread.is_alive() for thread in running._threads)


def test_a_prompt_is_answered_when_its_greedy_response_is_there_too(diary: Diary) -> None:
    pool = make_pool(diary, replicas=1)
    diary.made[0].holds = lambda request: request.request_id == "greedy-0-1"
    running = in_flight(pool, greedy=True)
    running.ask(prompts(0, 1), 0)
    (answer,) = collected(running, 1).values()
    assert (answer.prompt.index, len(answer.train), len(answer.greedy)) == (0, 2, 1)
    wait_for("the other one's responses", lambda: len(diary.asked) == 4)
    assert running.answers(0) == []
    diary.made[0].holds = held()
    assert set(collected(running, 1)) == {1}
    pool.close()


def test_aborted_prompts_are_told_and_can_be_asked_again(diary: Diary) -> None:
    pool = make_pool(diary)
    for engine in diary.made:
        engine.holds = held(1, 3)
    running = in_flight(pool)
    running.ask(prompts(0, 1, 2, 3), 0)
    assert set(collected(running, 2)) == {0, 2}
    running.abort()
    # Each of the two responses had a token.
    assert {a.prompt.index: (a.train, a.aborted_tokens) for a in running.answers(0)} == {1: (None, 2), 3: (None, 2)}
    for engine in diary.made:
        engine.holds = held()
    running.ask(prompts(1, 3), 1)
    assert all(a.train is not None for a in collected(running, 2).values())
    pool.close()


def test_what_waits_for_its_turn_is_aborted_without_being_sent(diary: Diary) -> None:
    pool = make_pool(diary, replicas=1)
    diary.made[0].holds = lambda request: True
    wide = recipe("abort")
    object.__setattr__(wide.rollout, "n", 512)  # two requests are all that a replica has in flight
    sampler = EngineSampler(pool, wide, lambda ids: "", OneRank(), None)  # type: ignore[arg-type]
    running = InFlight(sampler)
    running.ask(prompts(*range(8)), 0)
    wait_for("the first two", lambda: len(diary.asked) == 2)
    running.abort()
    # Of those that were sent each response had a token.
    assert (
        sorted((a.train is None, a.aborted_tokens) for a in running.answers(0)) == [(True, 0)] * 6 + [(True, 512)] * 2
    )
    assert len(diary.asked) == 2
    pool.close()


def test_an_abort_by_somebody_else_is_a_failure_of_the_server_and_the_request_is_made_again(diary: Diary) -> None:
    pool = make_pool(diary)
    diary.must_ask, diary.made[0].rubbish = frozenset({0}), cut_off
    running = in_flight(pool)
    running.ask(prompts(0, 1), 0)
    answers = collected(running, 2)
    assert all(rollout.finish_reason == "stop" for a in answers.values() for rollout in a.train or [])
    assert pool.take_counts()["quarantined"] == 1
    pool.close()


def test_settling_waits_for_all_and_loses_none(diary: Diary) -> None:
    pool = make_pool(diary, seconds=0.01)
    running = in_flight(pool)
    running.ask(prompts(*range(9)), 0)
    running.settle()
    assert len(diary.asked) == 9
    assert {a.prompt.index for a in running.answers(0)} == set(range(9))
    pool.close()


def test_a_failure_is_raised_at_the_next_look(diary: Diary) -> None:
    pool = make_pool(diary, max_restarts=0)
    diary.made[1].dead, diary.must_ask = True, frozenset({1})
    running = in_flight(pool)
    running.ask(prompts(*range(9)), 0)
    with pytest.raises(EngineError, match="engine replica 1 failed: server 1 is gone"):
        collected(running, 9)
    pool.close()


def test_when_all_replicas_are_lost_the_requests_go_on_after_the_next_publication(diary: Diary) -> None:
    pool = make_pool(diary, replicas=2)
    for engine in diary.made:
        engine.dead = True
    published: list[int] = []

    def republish() -> None:
        published.append(1)
        publish(pool, 0)

    running = in_flight(pool, republish)
    running.ask(prompts(*range(6)), 0)
    answers = collected(running, 6)
    assert published and all(a.train is not None for a in answers.values())
    assert pool.take_counts()["quarantined"] == 2
    pool.close()


def test_a_replica_that_came_back_takes_part_in_a_call_that_began_without_it(
    diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_ds.engine.pool._MAX_SEQUENCES", 4)  # else the one that is left would take all of them
    pool = make_pool(diary, replicas=2)
    first, second = diary.made
    second.holds = lambda request: True
    first.dead, diary.must_ask = True, frozenset({0})
    running = in_flight(pool, lambda: publish(pool, 0))
    running.ask(prompts(*range(12)), 0)
    wait_for("the restart", lambda: len(diary.made) == 3)
    answers = collected(running, 3)
    assert all(a.train is not None for a in answers.values()), "the restarted one answers, the other holds all it has"
    second.holds = lambda request: False
    collected(running, 9)
    pool.close()


def test_a_replica_that_hangs_in_an_abort_is_taken_out(diary: Diary) -> None:
    pool = make_pool(diary, stall=2.0)
    for engine in diary.made:
        engine.holds = lambda request: True
    diary.must_ask = frozenset({0, 1})
    running = in_flight(pool, lambda: publish(pool, 0), mode="abort")
    running.ask(prompts(*range(6)), 0)
    wait_for("requests at both", lambda: {replica for replica, _ in diary.asked} == {0, 1})
    hung = diary.made[1]
    hung.stopped = True
    running.abort()
    assert [a.train for a in running.answers(0)] == [None] * 6
    counts = pool.take_counts()
    assert counts["quarantined"] == 1 and counts["redone_requests"] == 0
    wait_for("the end of the hung one", lambda: hung.closed)
    pool.close()


def hold_first(diary: Diary) -> None:
    """Every replica holds the first request it was asked, so that its other slots stay free."""
    for engine in diary.made:
        engine.holds = lambda request, index=engine.index: (  # type: ignore[misc]
            request.request_id == next(name for replica, name in list(diary.asked) if replica == index)
        )


def test_what_a_replica_that_dies_in_an_update_had_taken_is_asked_after_it(diary: Diary) -> None:
    pool = make_pool(diary)
    first, second = diary.made
    hold_first(diary)
    diary.must_ask = frozenset({0, 1})
    running = in_flight(pool, lambda: publish(pool, 1))
    running.ask(prompts(*range(8)), 0)
    found = collected(running, 6)
    asked = len(diary.asked)

    def between() -> None:
        first.dead = True
        wait_for("the notice of its death", lambda: len(diary.made) == 3)
        time.sleep(0.1)
        assert len(diary.asked) == asked, "the other one has free slots, and no weights"

    publish(pool, 1, between=between)
    second.holds = lambda request: False
    late = collected(running, 2)
    assert set(found) | set(late) == set(range(8))
    assert pool.take_counts()["redone_requests"] == 1
    pool.close()


@pytest.fixture
def eager_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Health checks twenty times a second."""
    monkeypatch.setattr("grpo_ds.engine.pool._PROBE_S", 0.05)


@pytest.mark.usefixtures("eager_checks")
def test_a_health_check_in_an_update_judges_nobody(diary: Diary) -> None:
    pool = make_pool(diary, stall=20.0)
    hold_first(diary)
    diary.must_ask = frozenset({0, 1})
    running = in_flight(pool)
    running.ask(prompts(*range(8)), 0)
    found = collected(running, 6)

    def slow_finish(version: int) -> None:  # several health checks long the replicas hold different versions
        time.sleep(0.5)
        diary.made[1].held, diary.made[1].open = version, False

    diary.made[1].finish_update = slow_finish  # type: ignore[method-assign]
    publish(pool, 1)
    assert pool.take_counts()["quarantined"] == 0
    for engine in diary.made:
        engine.holds = lambda request: False
    assert set(found) | set(collected(running, 2)) == set(range(8))
    pool.close()


@pytest.mark.usefixtures("eager_checks")
def test_an_answer_to_a_health_check_from_before_an_update_judges_nobody(diary: Diary) -> None:
    pool = make_pool(diary, replicas=1, stall=20.0)
    (engine,) = diary.made
    engine.holds = lambda request: True
    checked, go_on, calls = threading.Event(), threading.Event(), Counter[str]()

    def late_version() -> int:
        """The first one is answered with the version of when it was asked."""
        held = engine.held
        calls["version"] += 1
        if not checked.is_set():
            checked.set()
            wait_for("the end of the update", go_on.is_set)
        return held

    engine.version = late_version  # type: ignore[method-assign]
    running = in_flight(pool)
    running.ask(prompts(0, 1), 0)
    wait_for("a health check", checked.is_set)
    publish(pool, 1)
    go_on.set()
    wait_for("the next health check, after the late one and the update's", lambda: calls["version"] >= 3)
    engine.holds = lambda request: False
    assert len(collected(running, 2)) == 2
    assert pool.take_counts()["quarantined"] == 0
    pool.close()


def test_requests_of_two_calls_share_the_replicas(diary: Diary) -> None:
    pool = make_pool(diary)
    diary.must_ask = frozenset({0, 1})
    answered: list[str] = []
    lock = threading.Lock()

    def on_answer(request: Request, rollouts: list[RawRollout]) -> None:
        with lock:
            answered.append(request.request_id)

    calls = [[Request((1,), 10 * k, f"{name}{k}") for k in range(20)] for name in "ab"]
    threads = [threading.Thread(target=pool.generate, args=(call, SPEC, on_answer)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert Counter(answered) == {request.request_id: 1 for call in calls for request in call}
    pool.close()
