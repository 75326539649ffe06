"""sync.mode over many rounds: whatever finishes when, each prompt is answered once, trained once, and never forgotten."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.clock import Clock
from grpo_ds.collect import Answer, Collection, Collector, Exhausted
from grpo_ds.config import (
    AlgorithmConfig,
    DataConfig,
    EngineConfig,
    FilterGroupsConfig,
    ModelConfig,
    Recipe,
    RecipeError,
    RewardConfig,
    RolloutConfig,
    SyncConfig,
    TrainConfig,
)
from grpo_ds.filters import get_filter
from grpo_ds.inflight import Foreground
from grpo_ds.metrics import group_metrics
from grpo_ds.types import Group, Prompt, Rollout, Scored, VersionSpan
from tests.unit.engine_fakes import Meeting, OneRank

NEEDED = 3
KEEP = get_filter("dynamic_sampling")


def recipe(mode: str, batch: int = 5, **filter_groups: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        reward=RewardConfig(functions=["f"]),
        rollout=RolloutConfig(n=2, prompts_per_batch=batch),
        algorithm=AlgorithmConfig(filter_groups=FilterGroupsConfig(**{"max_num_gen_batches": 0, **filter_groups})),
        train=TrainConfig(prompts_per_round=NEEDED),
        sync=SyncConfig(mode=mode),  # type: ignore[arg-type]
    )


class Endless:
    def take(self, start: int, count: int) -> list[Prompt]:
        return [Prompt(i, i, (1,), "p", {}) for i in range(start, start + count)]


def rollouts(begun: int, ended: int) -> list[Rollout]:
    spans = (VersionSpan(begun, 0, 1),) if begun == ended else (VersionSpan(begun, 0, 1), VersionSpan(ended, 1, 2))
    return [Rollout((5,) * len(spans), (-1.0,) * len(spans), "stop", spans, "")] * 2


def grade(pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]:
    """Two of three prompts have scores that differ."""
    return [
        Group(p, tuple(Scored(r, s, s, {"f": s}) for r, s in zip(rolls, [0.0, float(p.index % 3 > 0)], strict=True)))
        for p, rolls in pairs
    ]


@dataclass
class Node:
    """A node's engine, whose requests finish in any order; `version` is that of its weights."""

    rng: random.Random
    version: int = 0
    open: dict[int, tuple[Prompt, int]] = field(default_factory=dict)
    done: list[Answer] = field(default_factory=list)
    asked: Counter[int] = field(default_factory=Counter)

    def ask(self, prompts: list[Prompt], round_index: int) -> None:
        assert not self.open.keys() & {p.index for p in prompts}, "asked while it is in flight"
        self.open |= {p.index: (p, self.version) for p in prompts}
        self.asked.update(p.index for p in prompts)

    def finish(self, indices: list[int]) -> None:
        for index in indices:
            prompt, begun = self.open.pop(index)
            self.done.append(Answer(prompt, rollouts(begun, self.version)))

    def answers(self, enough: int) -> list[Answer]:
        self.finish(self.rng.sample(sorted(self.open), self.rng.randint(0, len(self.open))))
        done, self.done = self.done, []
        return done

    def abort(self) -> None:
        self.finish(self.rng.sample(sorted(self.open), self.rng.randint(0, len(self.open))))
        self.done += [Answer(prompt) for prompt, _ in self.open.values()]
        self.open.clear()

    def sample(self, prompts: list[Prompt], purpose: str, round_index: int) -> list[list[Rollout]]:
        self.asked.update(p.index for p in prompts)
        return [rollouts(self.version, self.version) for _ in prompts]


def collector(settings: Recipe, rank: Any, node: Node) -> Collector:
    generation = Foreground(node.sample) if settings.sync.mode == "drain" else node
    return Collector(settings, rank, Endless(), KEEP, generation, grade, print)  # type: ignore[arg-type]


@dataclass
class Story:
    """What one node trained and generated, round after round, and what a checkpoint would keep."""

    collections: list[Collection] = field(default_factory=list)
    cursor: int = 0
    carried: list[Group] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)

    def copy(self) -> Story:
        return replace(self, collections=list(self.collections))


def play(settings: Recipe, rank: Any, seed: int, rounds: int, crashes: bool) -> Story:
    """Rounds of one node; all nodes crash together and go on from the last checkpoint."""
    together, rng = random.Random(f"together {seed}"), random.Random(f"{rank.node} {seed}")
    node = Node(rng)
    collects = collector(settings, rank, node)
    saved, story = Story(), Story()
    while len(story.collections) < rounds:
        node.version = len(story.collections)
        story.collections.append(collects.collect(node.version, node.version, Clock()))
        story.cursor, story.carried = collects.cursor, list(collects.carried)
        story.unfinished = collects.unfinished()
        if together.random() < 0.5:
            saved = story.copy()
        if crashes and together.random() < 0.3:
            story, node = saved.copy(), Node(rng)
            collects = collector(settings, rank, node)
            collects.cursor, collects.carried = story.cursor, list(story.carried)
            collects.again = list(story.unfinished)
    return story


def check(stories: list[Story], settings: Recipe) -> None:
    """Over all nodes: one fate a prompt."""
    first = stories[0]
    for other in stories[1:]:
        assert (other.cursor, other.unfinished) == (first.cursor, first.unfinished)
        assert [c.order for c in other.collections] == [c.order for c in first.collections]
    trained = Counter(i for c in first.collections for i in c.order)
    assert set(trained.values()) <= {1}, "trained twice"
    mine = Counter(g.prompt.index for story in stories for c in story.collections for g in c.groups)
    assert mine == trained, "every group that all agreed on is on one node"
    made = Counter(g.prompt.index for story in stories for c in story.collections for g in c.rollouts)
    assert set(made.values()) <= {1}, "answered twice"
    carried = {g.prompt.index for story in stories for g in story.carried}
    assert trained.keys() | carried <= made.keys() and not trained.keys() & carried
    assert made.keys() | set(first.unfinished) == set(range(first.cursor)), "nothing that was drawn is forgotten"
    assert not made.keys() & set(first.unfinished)
    for story in stories:
        for version, collection in enumerate(story.collections):
            assert len(collection.order) == NEEDED
            assert collection.oldest == version - settings.algorithm.filter_groups.max_staleness
            lag = dict(zip(collection.order, collection.lags, strict=True))
            for group in collection.groups:
                young = [v for v in group.versions if v >= collection.oldest]
                assert lag[group.prompt.index] == version - min(young)
    if settings.sync.mode == "drain":
        assert not first.unfinished


@pytest.mark.parametrize("mode", ["drain", "keep", "abort"])
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 9), staleness=st.integers(0, 3), crashes=st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_prompt_has_one_fate_whatever_finishes_when(
    mode: str, seed: int, batch: int, staleness: int, crashes: bool
) -> None:
    chosen = recipe(mode, batch, max_staleness=staleness)
    check([play(chosen, OneRank(), seed, 12, crashes)], chosen)


@pytest.mark.parametrize("mode", ["drain", "keep", "abort"])
@given(seed=st.integers(0, 10**6), crashes=st.booleans())
@settings(max_examples=15, deadline=None)
def test_two_nodes_decide_together(mode: str, seed: int, crashes: bool) -> None:
    chosen, meeting, stories = recipe(mode), Meeting(2), {}

    def part(number: int, rank: Any) -> None:
        stories[number] = play(chosen, rank, seed, 8, crashes)

    meeting.play(part)
    check([stories[0], stories[1]], chosen)


class Scripted(Node):
    """Finishes what it is told to finish at each look; nothing more, when told nothing."""

    def __init__(self, *looks: list[int]) -> None:
        super().__init__(random.Random(0))
        self.looks = list(looks)

    def answers(self, enough: int) -> list[Answer]:
        self.finish(self.looks.pop(0) if self.looks else [])
        done, self.done = self.done, []
        return done

    def abort(self) -> None:
        self.done += [Answer(prompt, aborted_tokens=3) for prompt, _ in self.open.values()]
        self.open.clear()


def all_kept(mode: str, node: Node, **filter_groups: Any) -> Collector:
    chosen = recipe(mode, **{"enable": False, **filter_groups})
    return collector(chosen, OneRank(), node)


def test_keep_leaves_the_rest_running_and_takes_it_in_a_later_round() -> None:
    node = Scripted([4], [0, 2], [1], [3, 5, 6])
    collects = all_kept("keep", node)
    first = collects.collect(0, 0, Clock())
    assert first.order == [0, 2, 4] and first.lags == [0, 0, 0]
    assert first.counts["in_flight"] == 2 and collects.unfinished() == [1, 3]
    node.version = 1
    second = collects.collect(1, 1, Clock())
    # Two in flight and nothing in stock for a round of three: one batch more was drawn.
    assert collects.cursor == 10 and second.counts["batches"] == 1
    assert second.order == [1, 3, 5] and second.lags == [1, 1, 0]
    assert [g.prompt.index for g in collects.carried] == [6]
    assert collects.unfinished() == [7, 8, 9]


def test_no_prompt_is_drawn_while_what_is_in_flight_can_meet_the_need() -> None:
    node = Scripted([0, 1, 2], [3], [4], [5])
    collects = all_kept("keep", node, batch=9)
    assert collects.collect(0, 0, Clock()).order == [0, 1, 2]
    assert collects.collect(1, 0, Clock()).order == [3, 4, 5]
    assert collects.cursor == 9


def two_rounds(max_staleness: int) -> tuple[Scripted, Collector]:
    """Prompts 3, 4, begun under policy 0, and 8, 9, begun under policy 1, are in flight."""
    node = Scripted([0, 1, 2], [5, 6, 7])
    collects = all_kept("keep", node, max_staleness=max_staleness)
    for version, order in enumerate([[0, 1, 2], [5, 6, 7]]):
        node.version = version
        assert collects.collect(version, version, Clock()).order == order
    return node, collects


def test_what_was_answered_too_many_publications_ago_is_dropped_as_stale() -> None:
    node, collects = two_rounds(max_staleness=1)
    node.version = 0
    node.finish([3, 4])  # nobody looks until policy 2 is there
    node.version, node.looks = 2, [[8, 9], [10]]
    third = collects.collect(2, 2, Clock())
    assert third.counts["dropped/stale"] == 2
    assert third.order == [8, 9, 10] and third.lags == [1, 1, 0]


def test_what_ran_over_too_many_publications_is_taken_for_its_young_tokens() -> None:
    node, collects = two_rounds(max_staleness=1)
    node.version, node.looks = 2, [[3], [4, 8, 9]]
    third = collects.collect(2, 2, Clock())
    assert third.counts["dropped/stale"] == 0
    # Of 3 and 4 only the tokens of policy 2 are trained on, and 8 begins with one of policy 1, which may be.
    assert (third.order, third.lags, third.oldest) == ([3, 4, 8], [0, 0, 1], 1)
    assert [g.versions for g in third.groups] == [{0, 2}, {0, 2}, {1, 2}]


def test_a_carried_group_waits_as_long_as_its_youngest_token_may_be_trained_on() -> None:
    node, collects = two_rounds(max_staleness=1)
    node.version, node.looks = 2, [[3, 4, 8, 9]]
    collects.collect(2, 2, Clock())
    assert [(g.prompt.index, g.versions) for g in collects.carried] == [(9, {1, 2})]
    fourth = replace(collects.recipe, train=TrainConfig(prompts_per_round=1))
    collects.recipe = fourth
    assert collects.collect(3, 3, Clock()).lags == [1], "the token of policy 1 is masked now"
    assert collects.carried == []


def test_keep_without_staleness_trains_on_what_the_current_policy_made_of_what_ran_on() -> None:
    node, collects = two_rounds(max_staleness=0)
    node.version, node.looks = 2, [[3, 4, 8]]
    third = collects.collect(2, 2, Clock())
    assert (third.order, third.lags, third.oldest) == ([3, 4, 8], [0, 0, 0], 2)


def test_abort_asks_the_same_prompts_first_in_the_next_round_and_draws_no_new_ones_without_need() -> None:
    node = Scripted([4], [0, 2])
    collects = all_kept("abort", node)
    first = collects.collect(0, 0, Clock())
    assert first.order == [0, 2, 4] and first.counts["aborted"] == 2 and "in_flight" not in first.counts
    assert group_metrics(first)["tokens_aborted"] == 6
    assert collects.again == collects.unfinished() == [1, 3]
    node.version, node.looks = 1, [[1], [3, 7]]
    second = collects.collect(1, 1, Clock())
    assert second.order == [1, 3, 7] and second.lags == [0, 0, 0], "begun anew under the new policy"
    assert second.counts["asked_again"] == 2 and second.counts["batches"] == 1
    assert node.asked == {0: 1, 1: 2, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}


def test_prompts_asked_again_do_not_count_as_a_generation_batch() -> None:
    node = Scripted([0, 1, 2])
    collects = all_kept("abort", node, max_num_gen_batches=1)
    collects.collect(0, 0, Clock())
    node.looks = [[3, 4], [5]]
    assert collects.collect(1, 1, Clock()).order == [3, 4, 5]


def test_a_round_is_exhausted_only_when_nothing_is_in_flight_any_more() -> None:
    node = Scripted([0], [1], [2], [3], [4])
    collects = collector(recipe("keep", max_num_gen_batches=1), OneRank(), node)
    # Prompts 0 and 3 have equal scores: 1, 2 and 4 make the round.
    assert collects.collect(0, 0, Clock()).order == [1, 2, 4]
    node = Scripted([0, 1, 2, 3])
    collects = collector(recipe("keep", batch=4, max_num_gen_batches=1), OneRank(), node)
    with pytest.raises(Exhausted, match=r"1 generation batches .* gave 2 of 3 groups .*2 kept, 2 all_wrong"):
        collects.collect(0, 0, Clock())


def test_a_greedy_baseline_goes_with_its_group() -> None:
    node = Scripted()
    node.done = [Answer(Prompt(k, k, (1,), "p", {}), rollouts(0, 0), rollouts(0, 0)[:1]) for k in range(3)]
    graded: list[int] = []

    def grade_all(pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]:
        graded.append(len(pairs))
        return [Group(p, tuple(Scored(r, 1.0, 1.0, {"f": 1.0}) for r in rolls)) for p, rolls in pairs]

    collects = all_kept("keep", node)
    collects.grader, collects.in_flight, collects.cursor = grade_all, {0, 1, 2}, 3
    groups = collects.collect(0, 0, Clock()).groups
    assert graded == [3, 3] and [len(g.members) for g in groups] == [2, 2, 2]
    assert all(g.baseline is not None for g in groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": {"kind": "hf"}}, "engine.kind hf is part of the trainer: set sync.mode: drain"),
        ({"engine": {"sleep": True}}, "engine.sleep takes its memory away: set sync.mode: abort"),
    ],
)
def test_recipes_in_which_keep_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(recipe("keep"), engine=EngineConfig(**change["engine"]))
