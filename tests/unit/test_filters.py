"""Dynamic sampling and the overlong penalty."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_ds.config import RecipeError, RewardConfig
from grpo_ds.filters import Decision, get_filter, keep_group
from grpo_ds.rewards import make_group
from grpo_ds.rewards.overlong import soft_overlong_penalty
from grpo_ds.types import Prompt, Rollout, VersionSpan

scores = st.lists(st.none() | st.floats(-10, 10), max_size=8)


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ([1.0, 0.0], "kept"),
        ([1.0, 1.0, 1.0], "all_right"),
        ([0.5, 0.5], "all_right"),
        ([0.0, 0.0], "all_wrong"),
        ([-1.0, -1.0], "all_wrong"),
        ([1.0, None, None], "unscorable"),
        ([None, None], "unscorable"),
        ([], "unscorable"),
        ([1.0], "unscorable"),
        ([1.0, 1.0, None], "all_right"),
        ([1.0, None, 0.0], "kept"),
        ([0.0, -0.0], "all_wrong"),
    ],
)
def test_a_group_is_kept_iff_its_scores_differ(group: list[float | None], reason: str) -> None:
    assert keep_group(group) == Decision(reason == "kept", reason)


def test_equal_scores_whose_computed_deviation_is_not_zero_are_equal() -> None:
    group = [0.1] * 3
    mean = sum(group) / 3
    assert any(score != mean for score in group), "the trap this test is about"
    assert keep_group(group).reason == "all_right"


def test_a_difference_up_to_the_tolerance_counts_as_none() -> None:
    assert keep_group([1.0, 1.25], 0.25) == Decision(False, "all_right")
    assert keep_group([0.0, 0.25], 0.25) == Decision(False, "all_wrong")
    assert keep_group([1.0, 1.5], 0.25).keep


def test_a_score_that_is_not_finite_is_an_error_that_names_the_member() -> None:
    for score in (math.nan, math.inf):
        with pytest.raises(ValueError, match="of member 1 is not finite"):
            keep_group([0.0, score])


@given(scores, st.randoms(use_true_random=False))
def test_neither_order_nor_unscored_members_change_the_decision(group: list[float | None], rng: object) -> None:
    decision = keep_group(group)
    shuffled = [*group, None]
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert keep_group(shuffled) == decision
    assert decision.keep == (len({s for s in group if s is not None}) > 1)


def test_the_filter_is_a_plugin_with_its_tolerance() -> None:
    assert get_filter("dynamic_sampling", tolerance=0.5)([0.0, 0.4]).reason == "all_wrong"
    with pytest.raises(RecipeError, match="tolerance is -1.0, it must not be negative"):
        get_filter("dynamic_sampling", tolerance=-1.0)


def test_the_penalty_grows_linearly_over_the_buffer() -> None:
    # Longest 100, buffer 20: nothing to 80, then 1/20 of the factor for each token.
    lengths = (0, 80, 81, 90, 99, 100, 101)
    penalties = [soft_overlong_penalty(length, 100, 20, 2.0) for length in lengths]
    assert penalties == pytest.approx([0.0, 0.0, -0.1, -1.0, -1.9, -2.0, -2.0])


def test_no_buffer_means_no_penalty() -> None:
    assert soft_overlong_penalty(100, 100, 0, 1.0) == 0.0


def test_a_length_penalty_cannot_smuggle_an_all_right_group_through() -> None:
    # Both responses are right (score 1). Longest 100, buffer 20: 80 tokens are free, 90 cost half the factor.
    config = RewardConfig(functions=["arithmetic"], overlong_buffer_len=20, overlong_penalty_factor=1.0)
    rollouts = [
        Rollout((5,) * length, (-1.0,) * length, "stop", (VersionSpan(0, 0, length),), "85") for length in (80, 90)
    ]
    prompt = Prompt(0, 0, (1,), "27+58=", {"answer": "85"})
    group = make_group(prompt, rollouts, [{"arithmetic": 1.0}] * 2, config, 100)
    assert [m.score for m in group.members] == [1.0, 1.0]
    assert [m.reward for m in group.members] == [1.0, 0.5]
    assert keep_group([m.score for m in group.members]) == Decision(False, "all_right")
    assert keep_group([m.reward for m in group.members]) == Decision(True, "kept")
