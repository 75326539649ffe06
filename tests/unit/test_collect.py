"""Dynamic sampling of one rank: what is generated, kept, carried over, dropped, and when it gives up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from grpo_ds.clock import Clock
from grpo_ds.collect import Collector, Exhausted
from grpo_ds.config import (
    AlgorithmConfig,
    DataConfig,
    FilterGroupsConfig,
    ModelConfig,
    Recipe,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from grpo_ds.filters import Decision, get_filter
from grpo_ds.inflight import Foreground
from grpo_ds.metrics import group_metrics, reward_metrics
from grpo_ds.rewards import FunctionStats, make_group, soft_overlong_penalty
from grpo_ds.types import Group, Prompt, Rollout, Scored, VersionSpan
from tests.unit.engine_fakes import OneRank


def scored(rollout: Rollout, score: float | None) -> Scored:
    """What the filter must not look at is never what it must look at: rewards are shaped, and part `g` is the opposite."""
    return Scored(
        rollout, score, None if score is None else score - 7, {"f": score, "g": None if score is None else -3.0}
    )


class Endless:
    def take(self, start: int, count: int) -> list[Prompt]:
        return [Prompt(i, i, (1,), "p", {}) for i in range(start, start + count)]


class World:
    """Scores by prompt index; remembers what was asked of the engine. `version` is what the engine samples with."""

    def __init__(self, scores: Callable[[int], list[float | None]], **filter_groups: Any) -> None:
        self.scores = scores
        self.said: list[str] = []
        self.version = 0
        self.asked: list[tuple[str, int, list[int]]] = []
        recipe = Recipe(
            model=ModelConfig(path="m"),
            data=DataConfig(train="t"),
            reward=RewardConfig(functions=["f"]),
            rollout=RolloutConfig(n=2, prompts_per_batch=filter_groups.pop("batch", 4)),
            algorithm=AlgorithmConfig(filter_groups=FilterGroupsConfig(**filter_groups)),
            train=TrainConfig(prompts_per_round=3),
        )
        keep = get_filter("dynamic_sampling")
        generation = Foreground(self._sample)
        ranks: Any = OneRank()
        self.collector = Collector(recipe, ranks, Endless(), keep, generation, self._grade, self.said.append)

    def _sample(self, prompts: list[Prompt], purpose: str, round_index: int) -> list[list[Rollout]]:
        self.asked.append((purpose, round_index, [p.index for p in prompts]))
        rollout = Rollout((5,), (-1.0,), "stop", (VersionSpan(self.version, 0, 1),), "")
        return [[rollout] * 2 for _ in prompts]

    def _grade(self, pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]:
        return [
            Group(p, tuple(scored(r, s) for r, s in zip(rollouts, self.scores(p.index), strict=True)))
            for p, rollouts in pairs
        ]

    def collect(self, round_index: int = 0, version: int = 0) -> Any:
        self.version = version
        return self.collector.collect(round_index, version, Clock())


def odd_prompts_differ(index: int) -> list[float | None]:
    return [0.0, 1.0] if index % 2 else [1.0, 1.0]


def test_generation_goes_on_until_the_round_has_its_groups_and_surplus_is_carried() -> None:
    world = World(odd_prompts_differ)
    got = world.collect()
    assert got.order == [1, 3, 5]
    assert [g.prompt.index for g in got.groups] == [1, 3, 5]
    assert [asked for _, _, asked in world.asked] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [g.prompt.index for g in world.collector.carried] == [7]
    assert got.counts == {
        "kept": 4,
        "dropped/all_right": 4,
        "dropped/stale": 0,
        "aborted": 0,
        "tokens_aborted": 0,
        "batches": 2,
        "surplus": 1,
    }
    assert len(got.rollouts) == 8
    assert world.collector.cursor == 8


def test_carried_groups_come_first_in_the_next_round_and_spare_generation() -> None:
    world = World(lambda index: [0.0, 1.0], batch=6)
    assert world.collect().order == [0, 1, 2]
    second = world.collect(1, version=1)
    assert second.order == [3, 4, 5]
    assert len(world.asked) == 1
    assert second.counts.get("batches", 0) == 0
    assert [g.versions for g in second.groups] == [{0}] * 3
    assert second.lags == [1, 1, 1]


def test_carried_groups_older_than_max_staleness_are_dropped_and_counted() -> None:
    world = World(lambda index: [0.0, 1.0], batch=6, max_staleness=1)
    world.collect()
    third = world.collect(2, version=2)
    assert third.counts["dropped/stale"] == 3
    assert third.order == [6, 7, 8]


def test_a_filter_of_ones_own_may_give_any_reason_and_each_is_counted() -> None:
    world = World(lambda index: [0.0, 1.0], batch=6)
    reasons = {0: "aborted", 2: "batches", 4: "too easy"}  # the first two are also words of the collector's own
    verdicts = iter(Decision(k not in reasons, reasons.get(k, "splendid")) for k in range(6))
    world.collector.keep = lambda scores: next(verdicts)
    got = world.collect()
    assert got.order == [1, 3, 5]
    assert [world.collector.again, sorted(world.collector.in_flight)] == [[], []], "none of them is asked again"
    assert (got.counts["batches"], got.counts["kept"], got.counts["aborted"]) == (1, 3, 0)
    assert {name: n for name, n in got.counts.items() if name.startswith("dropped/") and n} == {
        "dropped/aborted": 1,
        "dropped/batches": 1,
        "dropped/too easy": 1,
    }
    row = group_metrics(got)
    assert (row["kept_groups"], row["dropped_groups"], row["dropped/too easy"]) == (3, 3, 1)


def test_what_the_filter_kept_is_told_apart_from_what_is_trained_on() -> None:
    world = World(lambda index: [0.0, 1.0], batch=4)
    rows = [group_metrics(world.collect(k)) for k in range(2)]
    # Four kept a batch, three trained on: the second round takes the surplus of the first and two of its own.
    assert [(row["groups/kept_by_filter"], row["kept_groups"], row["surplus_groups"]) for row in rows] == [
        (4, 3, 1),
        (4, 3, 2),
    ]


def test_exhaustion_is_an_error_that_counts_what_was_seen() -> None:
    four: list[list[float | None]] = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [None, 1.0]]
    world = World(lambda index: four[index % 4], max_num_gen_batches=2)
    with pytest.raises(Exhausted) as error:
        world.collect(9)
    assert "round 9: 2 generation batches" in str(error.value)
    assert str(error.value).endswith("or set on_exhausted: train_partial")
    assert "2 of 3 groups that the filter keeps (2 kept, 2 all_right, 2 all_wrong, 2 unscorable)" in str(error.value)


def test_train_partial_takes_what_there_is_but_not_nothing() -> None:
    world = World(
        lambda index: [0.0, 1.0] if index == 1 else [0.0, 0.0], max_num_gen_batches=2, on_exhausted="train_partial"
    )
    assert world.collect().order == [1]
    with pytest.raises(Exhausted, match="0 of 3 groups") as error:
        world.collect(1)
    assert "train_partial" not in str(error.value), "it is on already, and there is nothing to train on"


def test_without_the_filter_equal_scores_are_kept_and_only_unscorable_groups_are_not() -> None:
    world = World(lambda index: [None, None] if index == 1 else [1.0, 1.0], enable=False)
    assert world.collect().order == [0, 2, 3]


def test_the_filter_can_look_at_one_reward_function() -> None:
    world = World(odd_prompts_differ, metric_to_filter="f")
    assert world.collect().order == [1, 3, 5]


def test_a_response_without_a_score_does_not_keep_its_group_by_one_function() -> None:
    """f is 1 and 1 where there is a score, and 0 where a function with a weight said nothing."""
    world = World(lambda index: [1.0, 1.0], metric_to_filter="f", max_num_gen_batches=1)
    grade = world.collector.grader
    assert grade is not None

    def with_one_unscored(pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]:
        extra = [Scored(rollouts[0], None, None, {"f": 0.0, "g": None}) for _, rollouts in pairs]
        return [replace(g, members=(*g.members, e)) for g, e in zip(grade(pairs), extra, strict=True)]

    world.collector.grader = with_one_unscored
    with pytest.raises(Exhausted, match=r"0 of 3 groups that the filter keeps \(4 all_right\)"):
        world.collect()


def test_the_sampler_is_told_the_purpose_and_the_round() -> None:
    world = World(lambda index: [0.0, 1.0])
    world.collect(4)
    assert world.asked == [("train", 4, [0, 1, 2, 3])]


def test_without_the_filter_one_scored_response_is_enough() -> None:
    # A single scored member, as with rollout.n = 1: nothing to compare, but estimators of one response can use it.
    world = World(lambda index: [1.0, None], enable=False)
    collection = world.collect()
    assert collection.order == [0, 1, 2]
    assert collection.counts["kept"] == 4 and "dropped/unscorable" not in collection.counts


def test_without_the_filter_exhaustion_does_not_speak_of_it() -> None:
    world = World(lambda index: [None, None], enable=False, max_num_gen_batches=1)
    with pytest.raises(
        Exhausted, match=r"0 of 3 groups with a score \(4 unscorable\): look at the reward functions"
    ) as error:
        world.collect()
    assert "filter keeps" not in str(error.value) and "train_partial" not in str(error.value)


def test_a_round_that_needs_many_batches_says_so_a_line_a_batch() -> None:
    world = World(lambda index: [0.0, 1.0] if index % 8 == 7 else [1.0, 1.0], max_num_gen_batches=0)
    assert world.collect(3).order == [7, 15, 23]
    assert [line.partition(" begins")[0] for line in world.said] == [f"round 3: generation batch {k}" for k in (5, 6)]
    assert world.said[0].endswith("so far 2 of 3 groups that the filter keeps (2 kept, 14 all_right)")
    quick = World(odd_prompts_differ)
    quick.collect()
    assert quick.said == []


@pytest.mark.parametrize("answer", [True, None, (True, "kept"), Decision(False, None), Decision("yes", "kept")])  # type: ignore[arg-type]
def test_a_filter_that_gives_no_decision_is_named(answer: Any) -> None:
    world = World(odd_prompts_differ)
    world.collector.keep = lambda scores: answer
    with pytest.raises(
        ValueError, match="filter 'dynamic_sampling' from grpo_ds .* must return grpo_ds.filters.Decision"
    ):
        world.collect()


@pytest.mark.parametrize(("metric", "kept"), [("score", []), ("shaped", [0, 1, 2])])
def test_soft_overlong_punishment_smuggles_no_all_correct_group_through(metric: str, kept: list[int]) -> None:
    # Both answers are right, one is 4 tokens, one is 10 of 10: with a buffer of 4 their rewards are 1 and 0.
    reward = RewardConfig(functions=["right", "shaped"], weights=[1.0, 0.0], overlong_buffer_len=4)
    world = World(odd_prompts_differ, metric_to_filter=metric, on_exhausted="train_partial", max_num_gen_batches=1)

    def grade(pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]:
        groups = []
        for asked, _ in pairs:
            rollouts = [Rollout((5,) * n, (-1.0,) * n, "stop", (VersionSpan(0, 0, n),), "") for n in (4, 10)]
            parts = [
                {"right": 1.0, "shaped": 1.0 + soft_overlong_penalty(len(r.token_ids), 10, 4, 1.0)} for r in rollouts
            ]
            groups.append(make_group(asked, rollouts, parts, reward, 10))
        return groups

    world.collector.grader = grade
    if kept:
        collection = world.collect()
        assert collection.order == kept
        assert [m.reward for m in collection.groups[0].members] == [1.0, 0.0]
        return
    with pytest.raises(Exhausted, match=r"0 of 3 groups .*4 all_right"):
        world.collect()


def test_what_reward_functions_did_is_summed_over_nodes_and_the_slowest_call_counts() -> None:
    class TwoNodes:
        def all_gather(self, value: Any, what: str) -> list[Any]:
            return [value, {}, {"f": dict(samples=9, unscored=2, timeouts=1, errors=0, p95_call_s=0.5)}]

    row = reward_metrics({"f": FunctionStats(4, 3, 0, 3, 0.25)}, TwoNodes())  # type: ignore[arg-type]
    assert row == {"reward/f/errors": 3, "reward/f/timeouts": 1, "reward/f/unscored": 5, "seconds/reward_p95/f": 0.5}
    assert reward_metrics({}, OneRank()) == {}  # type: ignore[arg-type]
