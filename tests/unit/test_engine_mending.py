"""Sampling through engines that fail, as all ranks do it together: nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from grpo_ds.config import DataConfig, ModelConfig, Recipe, RewardConfig, RolloutConfig
from grpo_ds.engine.base import EngineError, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from grpo_ds.evaluate import EngineSampler, evaluate
from grpo_ds.inflight import Foreground
from grpo_ds.seeds import derive_seed
from grpo_ds.types import Group, Prompt, Rollout, Scored
from tests.unit.engine_fakes import (
    Diary,
    FakeEngine,
    Meeting,
    OneRank,
    cut_off,
    make_pool,
    publish,
    wait_for,
    without_logprobs,
)

RECIPE = Recipe(
    model=ModelConfig(path="m"),
    data=DataConfig(train="t"),
    reward=RewardConfig(functions=["f"]),
    rollout=RolloutConfig(n=2),
)


def prompts(start: int, count: int) -> list[Prompt]:
    return [Prompt(k, k, (1,), "p", {}) for k in range(start, start + count)]


def sampler(pool: EnginePool | None, ranks: Any, republish: Any) -> EngineSampler:
    return EngineSampler(pool, RECIPE, lambda ids: "", ranks, republish)


def check(rollouts: list[list[Rollout]], asked: list[Prompt], round_index: int, version: int) -> None:
    """Each prompt has its own two responses, by its own seed, of the current policy."""
    for row, prompt in zip(rollouts, asked, strict=True):
        seed = derive_seed(RECIPE.train.seed, "train", round_index, prompt.index)
        assert [r.token_ids for r in row] == [(seed,), (seed + 1,)]
        assert {span.version for r in row for span in r.spans} == {version}


def test_the_rest_is_asked_again_after_all_engines_were_lost() -> None:
    diary, published = Diary(), Counter[str]()
    pool = make_pool(diary, replicas=1, seconds=0.001)
    diary.made[0].before_answer = lambda: setattr(diary.made[0], "dead", len(diary.asked) > 5)

    def republish() -> None:
        published["n"] += 1
        publish(pool, 4)

    publish(pool, 4)
    sample = sampler(pool, OneRank(), republish)
    check(sample(prompts(0, 12), "train", 3), prompts(0, 12), 3, 4)
    assert published["n"] == 1
    counts = sample.faults()
    assert counts["engine/quarantined"] == counts["engine/restarts"] == 1
    # A request that was handed back may have been on its way to the one that failed.
    wait_for("what was on its way", lambda: len(diary.asked) == 12 + counts["engine/redone_requests"])
    pool.close()


def test_a_run_that_allows_no_restart_gets_the_cause() -> None:
    diary = Diary()
    pool = make_pool(diary, max_restarts=0)
    diary.made[0].dead = True
    sample = sampler(pool, OneRank(), None)
    assert sample.faults() == {}
    with pytest.raises(EngineError, match="server 0 is gone"):
        sample(prompts(0, 9), "train", 0)
    pool.close()


class Alone(OneRank):
    def sum(self, values: Tensor, what: str) -> Tensor:
        return values


def finish_reason_is_stop(pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]:
    """A grader that gives 1 for a whole response."""

    def scored(rollout: Rollout) -> Scored:
        score = float(rollout.finish_reason == "stop")
        return Scored(rollout, score, score, {"f": score})

    return [Group(prompt, tuple(scored(rollout) for rollout in row)) for prompt, row in pairs]


@pytest.fixture
def cutting() -> Iterator[EngineSampler]:
    """Over two engines, of which one answers with what somebody else cut off; it must be asked."""
    diary = Diary(must_ask=frozenset({0}))
    pool = make_pool(diary)
    diary.made[0].rubbish = cut_off
    yield sampler(pool, Alone(), lambda: publish(pool, 0))
    pool.close()


def test_what_somebody_else_cut_off_is_not_trained_on(cutting: EngineSampler) -> None:
    generation = Foreground(cutting)  # sync.mode drain
    generation.ask(prompts(0, 12), 0)
    answers = generation.answers(12)
    assert {rollout.finish_reason for answer in answers for rollout in answer.train or []} == {"stop"}
    assert len(answers) == 12 and all(len(answer.train or []) == 2 for answer in answers)
    assert cutting.faults()["engine/quarantined"] == 1


def test_what_somebody_else_cut_off_is_not_scored_in_an_evaluation(cutting: EngineSampler) -> None:
    score = evaluate(prompts(0, 12), cutting, finish_reason_is_stop, Alone(), "score")  # type: ignore[arg-type]
    assert score == 1.0
    assert cutting.faults()["engine/quarantined"] == 1


def test_all_ranks_publish_for_one_nodes_engine_and_go_on_together() -> None:
    """Node 0 loses its only engine, node 1 keeps its own, the third rank leads no node."""
    diaries = [Diary(), Diary()]
    pools: list[EnginePool | None] = [make_pool(diary, replicas=1, seconds=0.001) for diary in diaries] + [None]
    broken = diaries[0].made[0]
    broken.before_answer = lambda: setattr(broken, "dead", len(diaries[0].asked) > 3)
    meeting, shared = Meeting(3), Meeting(3)
    published, got = Counter[int](), {}

    def play(rank: int) -> None:
        pool, asked = pools[rank], prompts(10 * rank, 0 if rank == 2 else 8)

        def republish() -> None:
            shared.rank(rank).all_gather(None, "all take part in a publication")
            published[rank] += 1
            if pool:
                publish(pool, 0)

        sample = sampler(pool, meeting.rank(rank), republish)
        got[rank] = (sample(asked, "train", 0), sample.faults())

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert published == {0: 1, 1: 1, 2: 1}
    for rank in (0, 1):
        check(got[rank][0], prompts(10 * rank, 8), 0, 0)
    assert got[2][0] == []
    assert len(diaries[1].asked) == 8, "what the healthy node answered is not asked again"
    assert {faults["engine/quarantined"] for _, faults in got.values()} == {1}
    for pool in pools[:2]:
        assert pool is not None
        pool.close()


def break_one(diary: Diary, rng: random.Random) -> None:
    """Kills, stops, or spoils an engine that is well, as soon as there is one."""
    well: list[FakeEngine] = []

    def look() -> bool:
        well[:] = [e for e in diary.made if not (e.dead or e.stopped or e.rubbish or e.closed)]
        return bool(well)

    wait_for("an engine that is well", look)
    victim = rng.choice(well)
    how = rng.choice(["dead", "stopped", "rubbish"])
    setattr(victim, how, without_logprobs if how == "rubbish" else True)


@pytest.mark.parametrize("seed", range(3))
def test_thirty_rounds_with_twenty_random_faults_lose_and_double_nothing(seed: int) -> None:
    rng, diary = random.Random(seed), Diary()
    pool = make_pool(diary, replicas=2, max_restarts=100, stall=0.25, seconds=0.001)
    current = {"version": 0}
    sample = sampler(pool, OneRank(), lambda: publish(pool, current["version"]))
    faults = Counter(rng.randrange(30) for _ in range(20))
    asker: dict[tuple[int, ...], int] = {(derive_seed(RECIPE.train.seed, "train", k // 20, k),): k for k in range(600)}
    """Which prompt a first response of one token answers."""
    totals, seen = Counter[str](), Counter[int]()
    for round_index in range(30):
        timers = [threading.Timer(0.02 * rng.random(), break_one, (diary, rng)) for _ in range(faults[round_index])]
        during = rng.random() < 0.3  # a part of the faults falls into the weight update
        for timer in [] if during else timers:
            timer.start()
        asked = prompts(20 * round_index, 20)
        rollouts = sample(asked, "train", round_index)
        check(rollouts, asked, round_index, current["version"])
        seen.update(asker[row[0].token_ids] for row in rollouts)
        for timer in timers if during else []:
            timer.start()
        current["version"] += 1
        publish(pool, current["version"])
        for timer in timers:
            timer.join()
        totals.update(sample.faults())
    assert seen == {k: 1 for k in range(600)}
    assert totals["engine/quarantined"] >= 10, "most of the faults were met"
    # Every request beyond one a prompt is accounted for, so nothing that was answered was asked again.
    wait_for("what was on its way", lambda: len(diary.asked) == 600 + totals["engine/redone_requests"])
    pool.close()


def test_an_engine_of_its_own_is_sampled_without_any_talk_between_ranks() -> None:
    class Mute:
        def all_gather(self, value: Any, what: str) -> list[Any]:
            raise AssertionError("nothing to agree on")

    class Plain(FakeEngine):
        def generate(self, requests: Any, spec: SamplingSpec, on_answer: Any = None) -> Any:
            return [FakeEngine.generate(self, [request], spec)[0] for request in requests]

    engine = Plain(0, Diary())
    sample = EngineSampler(engine, RECIPE, lambda ids: "", Mute(), None)  # type: ignore[arg-type]
    check(sample(prompts(0, 4), "train", 1), prompts(0, 4), 1, 0)
