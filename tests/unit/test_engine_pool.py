"""Several engines behind one queue: order, balance, every kind of failure, and weights for those that came back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine import make_engine
from grpo_ds.engine.base import UNKNOWN_VERSION, EngineDown, EngineError, RawRollout, Request, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from grpo_ds.types import VersionSpan
from tests.unit.engine_fakes import (
    Diary,
    FakeEngine,
    Rubbish,
    answer_to,
    cut_off,
    make_pool,
    publish,
    wait_for,
    without_logprobs,
)

SPEC = SamplingSpec(n=2, max_tokens=4)
STALL_S = 1.0
"""Silence after which a replica counts as hung; a healthy one must answer within it on a busy machine too."""


def requests(count: int) -> list[Request]:
    return [Request((1, 2), 10 * k, f"r{k}") for k in range(count)]


def right(count: int, version: int = 0, spec: SamplingSpec = SPEC) -> list[list[RawRollout]]:
    return [answer_to(request, spec, version) for request in requests(count)]


def asks(diary: Diary) -> Counter[str]:
    return Counter(name for _, name in diary.asked)


@pytest.fixture
def diary() -> Iterator[Diary]:
    diary = Diary()
    yield diary
    for engine in diary.made:
        engine.close()  # lets threads go that wait for a stopped one


def test_answers_come_in_the_order_of_the_requests_and_each_is_asked_once(diary: Diary) -> None:
    pool = make_pool(diary, replicas=3)
    diary.must_ask = frozenset({0, 1, 2})
    assert pool.generate(requests(40), SPEC) == right(40)
    assert asks(diary) == {f"r{k}": 1 for k in range(40)}
    assert {replica for replica, _ in diary.asked} == {0, 1, 2}
    assert pool.generate([], SPEC) == []


def test_a_slow_replica_does_not_set_the_pace(diary: Diary) -> None:
    pool = make_pool(diary)
    # So slow that all others are asked before its first answer.
    diary.made[0].before_answer = lambda: wait_for("all requests", lambda: len(diary.asked) == 60)
    wide = SamplingSpec(n=256, max_tokens=4)  # 4 requests are all that one has in flight
    assert pool.generate(requests(60), wide) == right(60, spec=wide)
    assert sum(replica == 0 for replica, _ in diary.asked) <= 4, "an equal share were 30"


def test_who_is_left_takes_the_share_of_who_died_at_once(diary: Diary) -> None:
    """Of 40 requests each of two replicas has 15 in flight; the one that is left has all that are not answered."""
    pool, free = make_pool(diary), threading.Event()
    for engine in diary.made:
        engine.holds = lambda request: not free.is_set()
    with ThreadPoolExecutor(1) as threads:
        answers = threads.submit(pool.generate, requests(40), SPEC)
        wait_for("15 requests each", lambda: Counter(replica for replica, _ in diary.asked) == {0: 15, 1: 15})
        diary.made[0].dead = True
        wait_for("all 40", lambda: sum(replica == 1 for replica, _ in diary.asked) == 40)
        free.set()
        assert answers.result(60) == right(40)


def test_a_server_that_sleeps_between_generations_is_replaced_only_when_an_update_begins(diary: Diary) -> None:
    """At any other time the trainer may hold the memory; the update then waits for it, so that none wakes later."""
    config = EngineConfig(replicas=2, max_restarts=5, start_timeout_s=5, sleep=True)
    pool = EnginePool(lambda index: FakeEngine(index, diary), config)
    pool.start()
    pool.wait_ready()
    publish(pool, 1)
    diary.made[0].dead, diary.must_ask = True, frozenset({0})
    assert pool.generate(requests(20), SPEC) == right(20, 1)
    wait_for("the end of the dead one", lambda: diary.made[0].closed)
    assert pool.sleep() == 1
    time.sleep(0.5)
    assert len(diary.made) == 2, "nothing was started while the engine sleeps"
    publish(pool, 2)
    assert [engine.held for engine in diary.made[1:]] == [2, 2]
    pool.close()


def test_who_waits_for_its_turn_to_restart_ends_with_the_run(diary: Diary) -> None:
    others = set(threading.enumerate())
    config = EngineConfig(replicas=2, max_restarts=5, start_timeout_s=5, sleep=True)
    pool = EnginePool(lambda index: FakeEngine(index, diary), config)
    pool.start()
    pool.wait_ready()
    diary.made[0].dead, diary.must_ask = True, frozenset({0})
    assert pool.generate(requests(20), SPEC) == right(20)
    pool.close()
    wait_for("its end", lambda: set(threading.enumerate()) <= others)


def test_requests_of_a_killed_replica_are_answered_by_the_others_and_nothing_answered_is_asked_again(
    diary: Diary,
) -> None:
    pool = make_pool(diary)
    (victim, healthy), calls = diary.made, Counter[str]()

    def die_at_the_fifth() -> None:
        calls["n"] += 1
        if calls["n"] == 5:
            victim.dead = True

    victim.before_answer = die_at_the_fifth
    healthy.before_answer = lambda: wait_for("the death", lambda: victim.dead)
    assert pool.generate(requests(40), SPEC) == right(40)
    counts = pool.take_counts()
    assert counts["quarantined"] == 1
    assert counts["redone_requests"] >= 1
    # A request that was handed back may have been on its way to the victim.
    wait_for("what was on its way", lambda: len(diary.asked) == 40 + counts["redone_requests"])
    wait_for("the end of the victim", lambda: victim.closed)
    assert pool.take_counts()["quarantined"] == 0, "counted once"


def test_a_hung_replica_is_noticed_by_its_silence_and_ended(diary: Diary) -> None:
    pool = make_pool(diary, stall=STALL_S)
    diary.made[1].stopped, diary.must_ask = True, frozenset({1})
    start = time.monotonic()
    assert pool.generate(requests(10), SPEC) == right(10)
    assert STALL_S <= time.monotonic() - start < STALL_S + 60, "long before engine.request_timeout_s"
    wait_for("the end of the hung one", lambda: diary.made[1].closed)
    assert not diary.made[0].closed


RUBBISH: dict[str, Rubbish] = {
    "one response too few": lambda answer: answer[1:],
    "no log-probabilities": without_logprobs,
    "log-probabilities that are no numbers": lambda answer: [replace(r, logprobs=(float("nan"),)) for r in answer],
    "no tokens": lambda answer: [replace(r, token_ids=(), logprobs=(), spans=()) for r in answer],
    "tokens of no known policy": lambda answer: [replace(r, spans=()) for r in answer],
    "tokens of another policy": lambda answer: [replace(r, spans=(VersionSpan(7, 0, 1),)) for r in answer],
    "a response that somebody else cut off": cut_off,
    "something else altogether": lambda answer: [answer[999]],
}


@pytest.mark.parametrize("what", RUBBISH)
def test_a_replica_that_answers_rubbish_is_taken_out(diary: Diary, what: str) -> None:
    pool = make_pool(diary)
    diary.made[0].rubbish, diary.must_ask = RUBBISH[what], frozenset({0})
    assert pool.generate(requests(12), SPEC) == right(12)
    assert pool.take_counts()["quarantined"] == 1
    wait_for("the end of it", lambda: diary.made[0].closed)


def test_a_restarted_replica_serves_only_after_the_next_weight_update(diary: Diary) -> None:
    pool = make_pool(diary)
    publish(pool, 3)
    assert not pool.needs_weights()
    diary.made[0].dead, diary.must_ask = True, frozenset({0})
    assert pool.generate(requests(20), SPEC) == right(20, 3)
    wait_for("the restart", pool.needs_weights)
    counts, diary.must_ask = pool.take_counts(), frozenset()
    assert counts["restarts"] == 1
    wait_for("what was on its way", lambda: len(diary.asked) == 20 + counts["redone_requests"])
    diary.asked.clear()
    assert pool.generate(requests(20), SPEC) == right(20, 3)
    assert {replica for replica, _ in diary.asked} == {1}
    publish(pool, 3)
    assert not pool.needs_weights()
    diary.asked.clear()
    diary.must_ask = frozenset({0, 1})
    assert pool.generate(requests(20), SPEC) == right(20, 3)
    assert {replica for replica, _ in diary.asked} == {0, 1}
    assert pool.take_counts()["restarts"] == 0, "counted once"


def test_when_all_are_down_the_finished_part_is_handed_over_and_the_rest_is_asked_after_an_update(
    diary: Diary,
) -> None:
    pool = make_pool(diary, replicas=1, seconds=0.002)
    publish(pool, 1)
    calls = Counter[str]()

    def die_at_the_fourth() -> None:
        calls["n"] += 1
        diary.made[0].dead |= calls["n"] == 4

    diary.made[0].before_answer = die_at_the_fourth
    with pytest.raises(EngineDown) as down:
        pool.generate(requests(10), SPEC)
    finished = down.value.finished
    assert len(finished) <= 3, "the fourth and all later ones failed"
    assert all(finished[r.request_id] == answer_to(r, SPEC, 1) for r in requests(10) if r.request_id in finished)
    assert pool.needs_weights()
    publish(pool, 1)  # waits for the restart
    rest = [request for request in requests(10) if request.request_id not in finished]
    assert pool.generate(rest, SPEC) == [answer_to(request, SPEC, 1) for request in rest]


def test_without_restarts_the_first_failure_ends_the_call_at_once_with_its_cause(diary: Diary) -> None:
    pool = make_pool(diary, max_restarts=0)
    diary.made[1].dead, over = True, threading.Event()
    diary.made[0].before_answer = lambda: wait_for("the end of the call", over.is_set)
    with pytest.raises(EngineError, match="^engine replica 1 failed: server 1 is gone$") as error:
        pool.generate(requests(20), SPEC)  # the other replica answers nothing before it is over
    over.set()
    assert not isinstance(error.value, EngineDown)
    with pytest.raises(EngineError, match="server 1 is gone"):
        pool.needs_weights()


def test_without_restarts_an_abort_by_somebody_else_is_named(diary: Diary) -> None:
    pool = make_pool(diary, replicas=1, max_restarts=0)
    diary.made[0].rubbish = cut_off
    with pytest.raises(EngineError, match="request r0 was aborted at the server by somebody else"):
        pool.generate(requests(1), SPEC)


def test_more_failures_than_max_restarts_end_the_run_with_the_last_cause(diary: Diary) -> None:
    pool = make_pool(diary, replicas=1, max_restarts=2)
    diary.fails_to_start = 9
    diary.made[0].dead = True
    with pytest.raises(EngineError, match=r"failure 3 .* engine.max_restarts \(2\): .* it did not start"):
        for _ in range(9):
            try:
                pool.generate(requests(3), SPEC)
            except EngineDown:
                publish(pool, 0)


def test_a_restart_that_fails_is_tried_again(diary: Diary) -> None:
    pool = make_pool(diary, replicas=1, max_restarts=3)
    diary.fails_to_start = 2
    diary.made[0].dead = True
    with pytest.raises(EngineDown):
        pool.generate(requests(3), SPEC)
    publish(pool, 0)
    assert pool.generate(requests(3), SPEC) == right(3)
    assert len(diary.made) == 4


@pytest.mark.parametrize(("restarts", "alive"), [(0, False), (1, True)])
def test_one_dead_replica_is_the_engines_death_where_none_may_fail(diary: Diary, restarts: int, alive: bool) -> None:
    pool = make_pool(diary, max_restarts=restarts)
    assert pool.alive()
    diary.made[1].dead = True
    assert pool.alive() is alive


def test_an_engine_that_does_not_start_the_first_time_ends_the_run(diary: Diary) -> None:
    pool = EnginePool(lambda index: FakeEngine(index, diary), EngineConfig(replicas=2, max_restarts=5))
    diary.made[1].dead = True
    pool.start()
    with pytest.raises(EngineError, match="server 1 is gone"):
        pool.wait_ready()


@pytest.mark.parametrize("how", ["dead", "stopped"])
def test_a_replica_that_fails_in_an_update_is_taken_out_and_the_others_get_the_version(diary: Diary, how: str) -> None:
    pool = make_pool(diary, replicas=3, stall=STALL_S)
    publish(pool, 1, between=lambda: setattr(diary.made[1], how, True))
    assert [diary.made[k].held for k in (0, 2)] == [1, 1]
    wait_for("the end of the failed one", lambda: diary.made[1].closed)
    assert pool.generate(requests(9), SPEC) == right(9, 1)
    assert 1 not in {replica for replica, _ in diary.asked}
    wait_for("the restart", pool.needs_weights)
    publish(pool, 2)
    assert [engine.held for engine in diary.made if not engine.closed] == [2, 2, 2]


def test_an_update_in_which_all_fail_asks_for_another_one(diary: Diary) -> None:
    pool = make_pool(diary)

    def kill_all() -> None:
        for engine in diary.made[:2]:
            engine.dead = True

    publish(pool, 1, between=kill_all)
    assert pool.needs_weights()
    with pytest.raises(EngineDown) as down:
        pool.generate(requests(3), SPEC)
    assert down.value.finished == {}
    publish(pool, 1)
    assert pool.generate(requests(3), SPEC) == right(3, 1)


def test_one_that_reports_another_version_after_an_update_is_taken_out(diary: Diary) -> None:
    pool = make_pool(diary)
    diary.made[0].finish_update = lambda version: None  # type: ignore[method-assign]
    publish(pool, 1)
    assert pool.take_counts()["quarantined"] == 1


def test_each_replica_says_its_own_version(diary: Diary) -> None:
    pool = make_pool(diary, replicas=3)
    publish(pool, 4)
    assert pool.reported_versions() == [4, 4, 4]
    diary.made[1].held = 3
    assert pool.reported_versions() == [4, 3, 4]
    pool.version()  # takes it out
    assert pool.reported_versions()[1] == UNKNOWN_VERSION


def test_a_replica_that_died_between_calls_is_replaced_in_the_next_update(diary: Diary) -> None:
    pool = make_pool(diary, replicas=1)
    diary.made[0].dead = True
    publish(pool, 1)
    assert pool.generate(requests(2), SPEC) == right(2, 1)
    assert len(diary.made) == 2


def test_closing_ends_all_engines_and_whoever_waits_for_them(diary: Diary) -> None:
    pool = make_pool(diary, stall=60)
    for engine in diary.made:
        engine.stopped = True
    threading.Timer(0.2, pool.close).start()
    with pytest.raises(EngineError, match="closed while it generated"):
        pool.generate(requests(3), SPEC)
    pool.close()
    assert all(engine.closed for engine in diary.made)
    assert len(diary.made) == 2, "nothing is restarted any more"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "hf", "replicas": 2}, "mean nothing to engine.kind hf"),
        ({"kind": "hf", "max_restarts": 1}, "mean nothing to engine.kind hf"),
        ({"replicas": 2, "args": {"port": 8000}}, "one port for engine.replicas 2 servers"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make_engine(
            EngineConfig(**config),
            model_path="m",
            dtype="float32",
            max_model_len=8,
            log_dir=tmp_path,
            device="cpu",
            seed=0,
        )
