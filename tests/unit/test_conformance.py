"""The conformance kit: every built-in estimator passes, and a broken one fails the property it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from grpo_ds.config import RecipeError
from grpo_ds.conformance import PROPERTIES, Subject, check_estimator, estimator_suite
from grpo_ds.conformance.estimators import _result
from grpo_ds.estimators import REGISTRY
from grpo_ds.estimators.base import check_batch, check_finite

Out = tuple[Tensor, Tensor]
NO_NEEDS = {
    "min_group_size": 1,
    "greedy_baseline": False,
    "whole_batch": False,
    "per_function_rewards": False,
    "unshaped_rewards": False,
}
TestGrpoByItsSuite = estimator_suite("grpo", ddof=0)
"""What an author of a plugin writes; pytest collects one test a property."""


def centred(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    """A sound estimator: R minus the mean of its group."""
    batch = check_batch(rewards, mask, groups)
    return batch.spread(batch.groups.deviation(batch.totals)), batch.spread(batch.totals)


def leaks_padding(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    _, returns = centred(rewards, mask, groups)
    return rewards.sum(1, keepdim=True) * mask, returns


def writes_outside_the_mask(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    advantages, returns = centred(rewards, mask, groups)
    return torch.where(mask, advantages, 1.0), returns


def depends_on_order(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    """The first response of a group is the baseline."""
    _, returns = centred(rewards, mask, groups)
    same = groups[:, None] == groups
    first = torch.where(same, torch.arange(len(groups)), len(groups)).amin(1)
    totals = (rewards * mask).sum(1)
    return (totals - totals[first])[:, None] * mask, returns


def reads_labels(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    advantages, returns = centred(rewards, mask, groups)
    return advantages * (groups % 5 + 1)[:, None], returns


def divides_by_zero(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    """No eps below the standard deviation; a group of one is left alone."""
    batch = check_batch(rewards, mask, groups)
    deviation = batch.groups.deviation(batch.totals)
    scale = batch.groups.std(deviation, 1)[batch.groups.index]
    alone = batch.groups.sizes[batch.groups.index] == 1
    return batch.spread(deviation / torch.where(alone, 1.0, scale)), batch.spread(batch.totals)


def amplifies_rounding(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    """The textbook formula in float32: the mean of equal rewards is not their value."""
    _, returns = centred(rewards, mask, groups)
    totals = (rewards * mask).sum(1)
    same = (groups[:, None] == groups).float()
    mean = (same @ totals) / same.sum(1)
    std = ((same * (totals - mean[:, None]) ** 2).sum(1) / same.sum(1)).sqrt()
    return ((totals - mean) / (std + 1e-6))[:, None] * mask, returns


def breaks_on_one(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    batch = check_batch(rewards, mask, groups)
    leave_one_out = batch.groups.sizes / (batch.groups.sizes - 1)
    factor = leave_one_out[batch.groups.index]
    return batch.spread(factor * batch.groups.deviation(batch.totals)), batch.spread(batch.totals)


def overflows(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    advantages, returns = centred(rewards, mask, groups)
    return advantages * (1 + returns.abs().clamp(max=1e4).pow(10)), returns


def spreads_nan(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    totals = (rewards * mask).sum(1)
    same = (groups[:, None] == groups).double()
    advantages = (totals.double() - (same @ totals.double()) / same.sum(1)).float()
    return advantages[:, None] * mask, totals[:, None] * mask


def changes_inputs(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    out = centred(rewards, mask, groups)
    rewards.add_(1.0)
    return out


def wrong_dtype(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    advantages, returns = centred(rewards, mask, groups)
    return advantages.double(), returns


def uses_the_whole_batch_silently(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    advantages, returns = centred(rewards, mask, groups)
    return advantages / (advantages.abs().max() + 1.0), returns


def carries_a_gradient(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    advantages, returns = centred(rewards, mask, groups)
    return advantages.requires_grad_(), returns


def returns_one_value_a_sample(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    advantages, returns = centred(rewards, mask, groups)
    return advantages, returns[:, :1]


def is_small(estimator: Callable[..., Out]) -> Callable[..., Out]:
    """The same mistake where advantages are of the size 1e-5."""

    def small(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
        advantages, returns = estimator(rewards, mask, groups)
        return advantages * 1e-5, returns

    return small


def refuses_without_a_name(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
    if not rewards.isfinite().all():
        raise ValueError(f"of {len(rewards)} samples of {mask.shape[1]} tokens one is not finite in float64")
    return centred(rewards, mask, groups)


def failed(estimator: Callable[..., Any], **needs: bool | int) -> dict[str, str]:
    subject = Subject("estimator under test", estimator, {**NO_NEEDS, **needs}, functions=2)
    results = [_result(title, check, subject) for title, check in PROPERTIES.items()]
    assert len(results) == 13
    return {result.property: result.detail for result in results if not result.passed}


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_built_in_estimator_has_every_property(name: str) -> None:
    assert [result for result in check_estimator(name) if not result.passed] == []


@pytest.mark.parametrize(
    ("name", "options", "functions"),
    [
        ("grpo", {"norm_by_std": False, "singleton": "zero"}, 2),
        ("grpo", {"eps": 0.0, "ddof": 0}, 2),
        ("reinforce_plus_plus", {"gamma": 0.9}, 2),
        ("gdpo", {"weights": [0.5, 2.0, 1.0]}, 3),
    ],
)
def test_built_ins_have_the_properties_with_other_options_too(
    name: str, options: dict[str, Any], functions: int
) -> None:
    assert [result for result in check_estimator(name, options, functions) if not result.passed] == []


def test_a_sound_function_passes() -> None:
    assert failed(centred) == {}


BROKEN: list[tuple[Callable[..., Any], str, str]] = [
    (wrong_dtype, "shape and dtype", "advantages are torch.float64, not torch.float32"),
    (carries_a_gradient, "shape and dtype", "advantages require a gradient"),
    (writes_outside_the_mask, "zero outside the mask", "advantages are not 0 at"),
    (leaks_padding, "right padding", "by other padding"),
    (is_small(leaks_padding), "right padding", "by other padding"),
    (depends_on_order, "permutation of samples", "by reordering the samples"),
    (is_small(depends_on_order), "permutation of samples", "by reordering the samples"),
    (reads_labels, "relabelled groups", "by other group labels"),
    (is_small(reads_labels), "relabelled groups", "by other group labels"),
    (divides_by_zero, "constant rewards", "are nan with every reward 0.0"),
    (amplifies_rounding, "constant rewards", "equal rewards of 0.7 give an advantage of"),
    (is_small(amplifies_rounding), "constant rewards", "equal rewards of 0.7 give an advantage of"),
    (breaks_on_one, "singleton and uneven groups", "are nan with uneven groups"),
    (overflows, "extreme rewards", "with rewards of 1e6"),
    (spreads_nan, "non-finite rewards", "a value of nan in token_rewards is not refused"),
    (
        refuses_without_a_name,
        "non-finite rewards",
        "the refusal of nan in token_rewards does not name sample 79: of 140",
    ),
    (changes_inputs, "inputs not modified", "token_rewards was changed in place"),
    (uses_the_whole_batch_silently, "split over ranks", "need whole_batch and all_reduce"),
    (is_small(uses_the_whole_batch_silently), "split over ranks", "need whole_batch and all_reduce"),
]


@pytest.mark.parametrize(("estimator", "property_", "words"), BROKEN)
def test_a_broken_estimator_fails_exactly_the_property_it_breaks(
    estimator: Callable[..., Any], property_: str, words: str
) -> None:
    problems = failed(estimator)
    assert list(problems) == [property_]
    assert words in problems[property_]


def test_results_of_another_shape_are_found() -> None:
    assert failed(returns_one_value_a_sample)["shape and dtype"].startswith("returns have shape (")


def test_a_greedy_reward_that_is_not_finite_must_be_refused() -> None:
    def follows_greedy(rewards: Tensor, mask: Tensor, groups: Tensor, greedy_rewards: Tensor) -> Out:
        batch = check_batch(rewards, mask, groups)
        return batch.spread(batch.totals - greedy_rewards), batch.spread(batch.totals)

    problems = failed(follows_greedy, greedy_baseline=True)
    assert list(problems) == ["non-finite rewards"]
    assert "a value of nan in greedy_rewards is not refused" in problems["non-finite rewards"]


def by_function(rewards: Tensor, mask: Tensor, groups: Tensor, *, function_rewards: Tensor) -> Out:
    """Sums the functions' rewards, each minus its group's mean, and looks at nothing else."""
    batch = check_batch(rewards, mask, groups)
    parts = function_rewards.double().nan_to_num(0.0, 0.0, 0.0)
    return batch.spread(torch.stack([batch.groups.deviation(part) for part in parts.unbind(1)]).sum(0)), (
        batch.spread(batch.totals)
    )


def test_a_function_reward_that_is_not_finite_must_be_refused() -> None:
    problems = failed(by_function, per_function_rewards=True, unshaped_rewards=True)
    assert list(problems) == ["non-finite rewards"]
    assert "a value of nan in function_rewards is not refused" in problems["non-finite rewards"]


def test_an_estimator_that_looks_at_single_rewards_alone_must_say_that_shaping_is_lost() -> None:
    problems = failed(by_function, per_function_rewards=True)
    assert problems["shaped rewards"].endswith("so a penalty in the reward would be lost: declare unshaped_rewards")


def test_every_property_is_seen_to_fail() -> None:
    broken = {property_ for _, property_, _ in BROKEN} | {"determinism", "shaped rewards"}  # these two: tests above
    assert broken == set(PROPERTIES)


def test_a_random_estimator_is_not_deterministic() -> None:
    def random(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
        advantages, returns = centred(rewards, mask, groups)
        return advantages * (1 + 0.1 * torch.rand(())), returns

    assert failed(random)["determinism"] == "advantages differ between two calls with the same batch"


def test_an_estimator_with_a_smallest_group_must_refuse_smaller_ones() -> None:
    assert failed(centred, min_group_size=2) == {
        "singleton and uneven groups": "a group of 1 (min_group_size is 2) is not refused: raise ValueError, "
        "as grpo_ds.estimators.base.check_batch and check_finite do"
    }


def test_ranks_that_sum_unequally_often_fail_instead_of_hanging() -> None:
    def uneven(rewards: Tensor, mask: Tensor, groups: Tensor, *, all_reduce: Callable[[Tensor], Tensor]) -> Out:
        for _ in range(len(groups.unique())):
            all_reduce(torch.ones(1, dtype=torch.float64))
        return centred(rewards, mask, groups)

    problems = failed(uneven, whole_batch=True)
    assert problems == {"split over ranks": "the ranks do not call all_reduce equally often: a real run would hang"}


def test_a_whole_batch_estimator_must_take_a_rank_without_groups() -> None:
    def largest(rewards: Tensor, mask: Tensor, groups: Tensor, *, all_reduce: Callable[[Tensor], Tensor]) -> Out:
        count = all_reduce(torch.tensor([len(rewards), rewards.shape[0] and int(mask.sum())], dtype=torch.float64))
        rewards.max()  # has no value without samples
        advantages, returns = centred(rewards, mask, groups)
        return advantages / count[0].float(), returns

    assert list(failed(largest, whole_batch=True)) == ["split over ranks"]


def test_an_exception_and_a_wrong_result_are_failures_of_every_property_not_of_the_kit() -> None:
    def raises(rewards: Tensor, mask: Tensor, groups: Tensor) -> Out:
        raise KeyError("gone")

    assert set(failed(raises).values()) == {"it raised KeyError: 'gone'"}
    assert set(failed(lambda *_: 3).values()) == {"it returned int, not the two tensors (advantages, returns)"}


def test_the_suite_of_an_author_has_one_test_a_property_and_each_can_fail(tmp_path: Any) -> None:
    suite = estimator_suite("grpo")()
    tests = [name for name in dir(suite) if name.startswith("test_")]
    assert sorted(tests) == sorted(f"test_{title.replace(' ', '_')}" for title in PROPERTIES)
    (tmp_path / "mine.py").write_text(
        "def f(token_rewards, response_mask, group_index):\n    return token_rewards, 3\n"
    )
    broken = estimator_suite(f"{tmp_path}/mine.py:f")()
    for name in tests:
        with pytest.raises(AssertionError):
            getattr(broken, name)()


def test_an_estimator_that_cannot_be_built_is_refused_with_its_sentence() -> None:
    with pytest.raises(RecipeError, match="did you mean 'grpo'"):
        check_estimator("grpoo")


def test_what_an_estimator_declares_to_need_is_delivered() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Curious:
        greedy_baseline: ClassVar[bool] = True
        per_function_rewards: ClassVar[bool] = True

        def __call__(
            self, rewards: Tensor, mask: Tensor, groups: Tensor, *, greedy_rewards: Tensor, function_rewards: Tensor
        ) -> Out:
            assert greedy_rewards.shape == groups.shape and function_rewards.shape == (len(groups), 2)
            check_finite("greedy_rewards", greedy_rewards)
            check_finite("function_rewards", function_rewards)
            return centred(rewards, mask, groups)

    assert failed(Curious(), greedy_baseline=True, per_function_rewards=True) == {}
