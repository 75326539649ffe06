"""Edge cases, input errors and options of the estimators; numbers derived by hand."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_ds.config import RecipeError
from grpo_ds.estimators import REGISTRY, estimator_options, get_estimator
from grpo_ds.estimators.stats import find_groups, rewards_to_go, whiten
from tests.benchmarks import estimators as benchmark

GROUP_RELATIVE = ["grpo", "grpo_vectorized", "dr_grpo", "grpo_passk", "rloo", "opo", "gpg", "maxrl"]


def outcome(rewards: list[float], index: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Responses of one token with these rewards, one group by default."""
    labels = torch.tensor(index or [0] * len(rewards))
    return torch.tensor(rewards).reshape(-1, 1), torch.ones(len(rewards), 1), labels


@pytest.mark.parametrize("name", GROUP_RELATIVE)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, -2.3])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(name: str, reward: float) -> None:
    advantages, _ = get_estimator(name)(*outcome([reward] * 7 + [0.0, 1.0], [4] * 7 + [5] * 2))
    assert not advantages[:7].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("grpo", 3.0), ("dr_grpo", 3.0), ("rloo", 3.0), ("opo", 0.0), ("gpg", 0.0), ("maxrl", 0.0)],
)
def test_a_response_without_siblings(name: str, expected: float) -> None:
    advantages, _ = get_estimator(name)(*outcome([3.0]))
    assert advantages.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_singleton_zero_gives_a_response_without_siblings_nothing(name: str) -> None:
    advantages, _ = get_estimator(name, singleton="zero")(*outcome([3.0, 1.0, 2.0], [0, 1, 1]))
    assert advantages[0].item() == 0.0 and advantages[2].item() > 0


def test_ddof_and_eps_are_options() -> None:
    # Rewards 0 and 2: deviations -1 and 1, variance 2 with ddof 1 and 1 with ddof 0.
    population, _ = get_estimator("grpo", ddof=0, eps=1.0)(*outcome([0.0, 2.0]))
    assert population.flatten().tolist() == [-0.5, 0.5]


def test_equal_rewards_and_eps_zero_are_no_division_by_zero() -> None:
    for name in ("grpo", "grpo_passk"):
        assert not get_estimator(name, eps=0.0)(*outcome([1.0, 1.0]))[0].any()
    assert not get_estimator("reinforce_plus_plus", whiten_eps=0.0)(*outcome([1.0, 1.0]))[0].any()


def test_passk_rewards_nobody_when_two_are_best() -> None:
    assert not get_estimator("grpo_passk")(*outcome([1.0, 5.0, 5.0]))[0].any()


def test_passk_refuses_a_response_without_siblings() -> None:
    with pytest.raises(ValueError, match="the group of sample 2 has fewer than 2 members"):
        get_estimator("grpo_passk")(*outcome([1.0, 2.0, 3.0], [0, 0, 8]))


def test_passk_scores_the_margin_over_the_second() -> None:
    # Rewards 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7.
    advantages, _ = get_estimator("grpo_passk", eps=0.0)(*outcome([1.0, 2.0, 6.0]))
    assert advantages.flatten().tolist() == pytest.approx([0.0, 0.0, 4 / 7**0.5])


def test_gpg_scales_by_the_share_of_rewarded_samples_and_survives_none() -> None:
    # 4 samples, one rewarded: alpha = 4; mean 0.25.
    advantages, _ = get_estimator("gpg")(*outcome([0.0, 0.0, 0.0, 1.0]))
    assert advantages.flatten().tolist() == [-1.0, -1.0, -1.0, 3.0]
    assert not get_estimator("gpg")(*outcome([0.0, 0.0]))[0].any()


def test_maxrl_gives_nothing_where_the_mean_is_not_positive() -> None:
    advantages, _ = get_estimator("maxrl")(*outcome([-1.0, 1.0, -3.0, 1.0, 1.0, 3.0], [0, 0, 1, 1, 2, 2]))
    assert advantages.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, -0.5, 0.5]


def test_tool_output_inside_a_response_carries_the_return_without_discount() -> None:
    # Tokens: sampled, tool, tool, sampled with reward 8. gamma 0.5 counts sampled tokens only: 4 on the first.
    rewards, mask = torch.tensor([[0.0, 0.0, 3.0, 8.0]]), torch.tensor([[1, 0, 0, 1]])
    _, returns = get_estimator("reinforce_plus_plus", gamma=0.5)(rewards, mask, torch.tensor([0]))
    assert returns.tolist() == [[4.0, 0.0, 0.0, 8.0]]


def test_the_discounted_scan_is_safe_over_long_responses() -> None:
    rewards = torch.zeros(1, 5000, dtype=torch.float64)
    rewards[0, -1] = 1.0
    returns = rewards_to_go(rewards, torch.ones(1, 5000, dtype=torch.bool), 0.9)
    assert returns.isfinite().all()
    assert returns[0, -11].item() == pytest.approx(0.9**10)


def test_whitening_does_not_cancel_far_from_zero() -> None:
    # One-pass sum of squares loses everything here: 1e9 squared has no room for 1.
    values = torch.tensor([[1e9 - 1.0, 1e9 + 1.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert whiten(values, mask, eps=0.0, ddof=0, all_reduce=None).tolist() == [[-1.0, 1.0]]


def extras(name: str, samples: int) -> dict[str, Any]:
    """What the trainer delivers beside the three arguments, for so many samples and two reward functions."""
    needs = REGISTRY.needs(name)
    greedy = {"greedy_rewards": torch.zeros(samples)} if needs["greedy_baseline"] else {}
    return greedy | ({"function_rewards": torch.zeros(samples, 2)} if needs["per_function_rewards"] else {})


@pytest.mark.parametrize("name", sorted(REGISTRY._builtin))
def test_an_empty_batch_gives_an_empty_result(name: str) -> None:
    empty = torch.zeros(0, 4)
    advantages, returns = get_estimator(name)(empty, empty, torch.zeros(0, dtype=torch.int64), **extras(name, 0))
    assert advantages.shape == returns.shape == (0, 4)


@pytest.mark.parametrize("name", sorted(REGISTRY._builtin))
def test_bad_inputs_name_the_sample(name: str) -> None:
    estimator, extra = get_estimator(name), extras(name, 4)
    rewards, mask, index = torch.ones(4, 2), torch.ones(4, 2), torch.tensor([0, 0, 1, 1])
    mask[2, 1] = 0
    for value in (float("nan"), float("inf"), float("-inf")):
        for token in (0, 1):  # inside the mask and outside of it
            bad = rewards.clone()
            bad[2, token] = value
            with pytest.raises(ValueError, match="token_rewards of sample 2 is not finite"):
                estimator(bad, mask, index, **extra)
    hole = mask.clone()
    hole[3] = 0
    with pytest.raises(ValueError, match="response_mask of sample 3 has no token"):
        estimator(rewards, hole, index, **extra)
    with pytest.raises(ValueError, match=r"group_index has shape \(3,\) for 4 samples: sample 3"):
        estimator(rewards, mask, index[:3], **extra)
    with pytest.raises(ValueError, match=r"group_index has shape \(5,\) for 4 samples"):
        estimator(rewards, mask, torch.zeros(5, dtype=torch.int64), **extra)
    with pytest.raises(ValueError, match="must have the same shape"):
        estimator(rewards, mask[:, :1], index, **extra)


def test_finite_rewards_whose_sum_overflows_are_finite() -> None:
    advantages, _ = get_estimator("dr_grpo")(*outcome([3e38, 3e38, 3e38]))
    assert not advantages.any()


def test_remax_names_the_sample_without_a_greedy_reward() -> None:
    args = outcome([1.0, 2.0, 3.0])
    for greedy, sample in ((None, 0), (torch.zeros(2), 2)):
        with pytest.raises(ValueError, match=f"needs greedy_rewards.*sample {sample} is the first without"):
            get_estimator("remax")(*args, greedy_rewards=greedy)
    with pytest.raises(ValueError, match="greedy_rewards of sample 1 is not finite"):
        get_estimator("remax")(*args, greedy_rewards=torch.tensor([0.0, float("nan"), 0.0]))


def test_gdpo_names_what_is_wrong_with_the_function_rewards() -> None:
    args = outcome([1.0, 2.0])
    with pytest.raises(ValueError, match="function_rewards of sample 1 is not finite"):
        get_estimator("gdpo")(*args, function_rewards=torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for 2 samples: sample 1"):
        get_estimator("gdpo")(*args, function_rewards=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="2 weights for 3 reward functions"):
        get_estimator("gdpo", weights=[1.0, 2.0])(*args, function_rewards=torch.zeros(2, 3))


def test_needs_are_declared() -> None:
    needs = {name: REGISTRY.needs(name) for name in REGISTRY._builtin}
    assert [name for name in sorted(needs) if needs[name]["min_group_size"] != 1] == ["grpo_passk"]
    assert [name for name in sorted(needs) if needs[name]["greedy_baseline"]] == ["remax"]
    assert [name for name in sorted(needs) if needs[name]["per_function_rewards"]] == ["gdpo"]
    whole = ["gdpo", "gpg", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
    assert [name for name in sorted(needs) if needs[name]["whole_batch"]] == whole


def test_general_recipe_keys_reach_the_estimators_that_know_them() -> None:
    assert estimator_options("grpo", False, 0.9, {"eps": 0.1}) == {"norm_by_std": False, "eps": 0.1}
    assert estimator_options("dr_grpo", False, 0.9, {}) == {}
    assert estimator_options("reinforce_plus_plus", False, 0.9, {}) == {"gamma": 0.9}


def test_an_explicit_option_goes_before_the_default_of_the_general_key() -> None:
    assert estimator_options("grpo", True, 1.0, {"norm_by_std": False}) == {"norm_by_std": False}
    assert estimator_options("grpo", False, 1.0, {"norm_by_std": False}) == {"norm_by_std": False}


def test_a_contradiction_between_general_key_and_option_is_refused() -> None:
    with pytest.raises(RecipeError, match=re.escape("algorithm.norm_adv_by_std_in_grpo is False")):
        estimator_options("grpo", False, 1.0, {"norm_by_std": True})
    with pytest.raises(RecipeError, match="algorithm.gamma is 0.9 but algorithm.estimator_args.gamma is 0.5"):
        estimator_options("reinforce_plus_plus", True, 0.9, {"gamma": 0.5})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {"eps": -1.0}, "eps is -1.0, it must not be negative"),
        ("grpo", {"ddof": 2}, "option 'ddof' is 2"),
        ("grpo", {"singleton": "one"}, "option 'singleton' is 'one'"),
        ("reinforce_plus_plus", {"gamma": 1.5}, r"gamma is 1.5, it must lie in \[0, 1\]"),
        ("gdpo", {"weights": ["a"]}, "option 'weights'"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        get_estimator(name, **options)


rewards_in_groups = st.lists(
    st.tuples(
        st.integers(-(2**62), 2**62), st.lists(st.sampled_from([0.0, 1.0, -0.5, 0.1, 1e6]), min_size=2, max_size=5)
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda group: group[0],
)


@settings(max_examples=50, deadline=None)
@given(rewards_in_groups)
def test_advantages_of_a_group_are_finite_and_sum_to_zero(groups: list[tuple[int, list[float]]]) -> None:
    rewards = [reward for _, members in groups for reward in members]
    args = outcome(rewards, [label for label, members in groups for _ in members])
    index = find_groups(args[2])
    for name in ("grpo", "dr_grpo", "rloo", "opo", "gpg"):
        advantages = get_estimator(name)(*args)[0].flatten().to(torch.float64)
        assert advantages.isfinite().all()
        scale = advantages.abs().max().item() + 1
        assert index.sum(advantages).abs().max().item() < 1e-5 * scale


@settings(max_examples=50, deadline=None)
@given(rewards_in_groups, st.sampled_from([-3.0, 0.5, 100.0]))
def test_a_constant_added_to_all_rewards_of_a_group_changes_no_advantage(
    groups: list[tuple[int, list[float]]], shift: float
) -> None:
    rewards = [reward for _, members in groups for reward in members]
    token_rewards, mask, index = outcome(rewards, [label for label, members in groups for _ in members])
    precise = token_rewards.to(torch.float64)
    for name in ("grpo", "dr_grpo", "rloo", "grpo_passk", "opo"):
        estimator = get_estimator(name, **({"eps": 1e-3} if name in ("grpo", "grpo_passk") else {}))
        before, after = estimator(precise, mask, index)[0], estimator(precise + shift, mask, index)[0]
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_the_benchmark_times_every_built_in_and_its_loops_agree() -> None:
    assert {name for name, _, _ in benchmark.LOOPS} == set(REGISTRY._builtin)
    args, everything = benchmark.make_batch(groups=16, size=4, tokens=6)
    for name, options, loop in benchmark.LOOPS:
        needs = benchmark.declared(name, everything)
        advantages, _ = get_estimator(name, **options)(*args, **needs)
        torch.testing.assert_close(advantages, loop(args, needs).float(), rtol=1e-5, atol=1e-5)
