"""KL estimates, importance weights and the statistics of the train/inference mismatch."""

import math
import random

import pytest
import torch
from torch import Tensor

from grpo_ds.config import RecipeError
from grpo_ds.losses import (
    KlController,
    importance_weights,
    kl_estimate,
    mismatch_stats,
    rejection_mask,
    summarise_mismatch,
)
from grpo_ds.objective import merge

FORMULAS = {
    "k1": lambda d: d,
    "abs": abs,
    "k2": lambda d: d * d / 2,
    "mse": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "low_var": lambda d: math.exp(-d) - 1 + d,
}
DIFFERENCES = [-1.3, -0.2, 0.0, 0.4, 2.0]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("plus", ["", "+"])
def test_kl_estimates_equal_their_formula(name: str, plus: str) -> None:
    ref = torch.linspace(-3, -1, 5, dtype=torch.float64)
    kl = kl_estimate(name + plus, ref + torch.tensor(DIFFERENCES), ref)
    torch.testing.assert_close(
        kl, torch.tensor([FORMULAS[name](d) for d in DIFFERENCES], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_the_plus_takes_the_gradient_of_k2_and_keeps_the_value(name: str) -> None:
    lp = torch.tensor(DIFFERENCES, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(kl_estimate(name + "+", lp, torch.zeros(5)).sum(), lp)
    assert gradient.tolist() == DIFFERENCES


def test_the_gradient_of_k3_without_plus_is_its_own() -> None:
    lp = torch.tensor(DIFFERENCES, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(kl_estimate("k3", lp, torch.zeros(5)).sum(), lp)
    assert gradient.tolist() == pytest.approx([1 - math.exp(-d) for d in DIFFERENCES])


def test_the_reference_gets_no_gradient() -> None:
    ref = torch.zeros(2, requires_grad=True)
    assert not kl_estimate("k3", torch.ones(2), ref).requires_grad


def test_k3_is_bounded_where_the_policies_are_far_apart() -> None:
    assert kl_estimate("k3", torch.tensor([-1000.0, 1000.0, -5.0]), torch.zeros(3)).tolist() == [10.0, 10.0, 10.0]


def test_unknown_kl_names_list_what_exists() -> None:
    for name in ("k4", "k3++", "", "+"):
        with pytest.raises(RecipeError, match="there are: k1, abs, k2, mse, k3, low_var"):
            kl_estimate(name, torch.zeros(1), torch.zeros(1))


def test_both_weights_and_both_modes() -> None:
    # Ratios 4, 0.25 | 3, 3 | 0.1 in three sequences; sequence products 1, 9 and 0.1.
    old, roll = torch.tensor([4.0, 0.25, 3.0, 3.0, 0.1]).log(), torch.zeros(5)
    index = torch.tensor([0, 0, 1, 1, 2])
    expected = {
        ("token", "truncate"): [2.0, 0.25, 2.0, 2.0, 0.1],
        ("token", "mask"): [0.0, 0.25, 0.0, 0.0, 0.0],
        ("sequence", "truncate"): [1.0, 1.0, 2.0, 2.0, 0.1],
        ("sequence", "mask"): [1.0, 1.0, 0.0, 0.0, 0.0],
        ("off", "truncate"): [1.0] * 5,
    }
    for (level, mode), weights in expected.items():
        got = importance_weights(old, roll, index, level, mode, lower=0.2, upper=2.0)
        assert got.tolist() == pytest.approx(weights), (level, mode)


def test_the_bounds_of_the_mask_are_inside() -> None:
    weights = importance_weights(torch.zeros(1), torch.zeros(1), torch.tensor([0]), "token", "mask", 1.0, 1.0)
    assert weights.tolist() == [1.0]


def test_weights_carry_no_gradient_and_do_not_overflow() -> None:
    old = torch.tensor([500.0, 500.0, -500.0], requires_grad=True)
    for level in ("token", "sequence"):
        weights = importance_weights(old, torch.zeros(3), torch.tensor([0, 0, 1]), level, "truncate", 0.5, 1e30)
        assert not weights.requires_grad
        assert weights.tolist() == pytest.approx([math.exp(20), math.exp(20), math.exp(-20)], rel=1e-5)


def test_weights_of_an_empty_micro_batch_are_empty() -> None:
    empty, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for level in ("off", "token", "sequence"):
        assert importance_weights(empty, empty, index, level, "truncate", 0.5, 2.0).shape == (0,)
        assert summarise_mismatch(mismatch_stats(empty, empty, empty, index, level)) == {}


def test_unknown_level_and_mode_are_refused() -> None:
    one, index = torch.zeros(1), torch.tensor([0])
    with pytest.raises(RecipeError, match="importance level 'tokens' must be one of off, token, sequence"):
        importance_weights(one, one, index, "tokens", "truncate", 0.5, 2.0)
    with pytest.raises(RecipeError, match="mode 'clip' one of truncate, mask"):
        importance_weights(one, one, index, "token", "clip", 0.5, 2.0)


def random_tokens(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = random.Random(seed)
    old = torch.tensor([rng.uniform(-5, -0.01) for _ in range(count)], dtype=torch.float64)
    roll = old - torch.tensor([rng.gauss(0, 0.08) for _ in range(count)], dtype=torch.float64)
    return old, roll, (old - roll).exp().clamp(max=1.1)


def stats(old: Tensor, roll: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Of token weights; which sequences the tokens belong to does not matter then."""
    return mismatch_stats(old, roll, weights, torch.zeros(len(old), dtype=torch.int64), "token")


def test_chi_squared_and_sample_size_of_sequence_weights_are_those_of_whole_sequences() -> None:
    # Sequence weights 2 * 2 = 4 and 0.5 * 2 * 2 = 2: mean square (16 + 4) / 2, ess (4 + 2)^2 / (20 * 2).
    old, roll = torch.tensor([2.0, 2.0, 0.5, 2.0, 2.0]).log(), torch.zeros(5)
    index = torch.tensor([0, 0, 1, 1, 1])
    weights = importance_weights(old, roll, index, "sequence", "truncate", 0.5, 3.0)
    summary = summarise_mismatch(mismatch_stats(old, roll, weights, index, "sequence"))
    assert (summary["chi2"], summary["ess"]) == pytest.approx((10 - 1, 0.9))
    assert summary["weight_mean"] == pytest.approx((3 + 3 + 2 + 2 + 2) / 5)
    # Four tokens of weight 2 and one of 0.5: mean square (16 + 0.25) / 5.
    by_token = summarise_mismatch(mismatch_stats(old, roll, weights, index, "token"))
    assert by_token["chi2"] == pytest.approx(16.25 / 5 - 1)
    halves = [
        mismatch_stats(old[part], roll[part], weights[part], index[part], "sequence")
        for part in (index == 0, index == 1)
    ]
    assert summarise_mismatch(merge(*halves)) == pytest.approx(summary)


def test_rejection_looks_at_the_token_or_at_its_sequence() -> None:
    # Ratios 4, 0.25 | 3, 3 | 0.1: products 1, 9 and 0.1, geometric means 1, 3 and 0.1.
    old, roll, index = torch.tensor([4.0, 0.25, 3.0, 3.0, 0.1]).log(), torch.zeros(5), torch.tensor([0, 0, 1, 1, 2])
    expected = {"token": [0, 1, 1, 1, 0], "sequence": [1, 1, 0, 0, 0], "geometric": [1, 1, 1, 1, 0]}
    for level, mask in expected.items():
        assert rejection_mask(old, roll, index, level, 0.2, 3.5).tolist() == mask, level
    assert rejection_mask(old, roll, index, "token", 0.0, 1e9).tolist() == [1] * 5
    with pytest.raises(RecipeError, match="importance.reject 'off' must be"):
        rejection_mask(old, roll, index, "off", 0.5, 2.0)


def test_the_summary_equals_the_definitions() -> None:
    old, roll, weights = random_tokens(0, 3000)
    pairs = list(zip(old.tolist(), roll.tolist(), strict=True))
    gaps = sorted(abs(math.exp(x) - math.exp(y)) for x, y in pairs)
    raw = [math.exp(x - y) for x, y in pairs]
    n = len(pairs)
    summary = summarise_mismatch(stats(old, roll, weights))
    assert summary["prob_gap_p99"] == pytest.approx(gaps[math.ceil(0.99 * n) - 1], rel=0.05)
    exact = {
        "prob_gap_mean": sum(gaps) / n,
        "prob_gap_max": gaps[-1],
        "weight_outside": sum(not 0.9 <= w <= 1.1 for w in raw) / n,
        "kl": sum(w - 1 - math.log(w) for w in raw) / n,
        "chi2": sum(w * w for w in raw) / n - 1,
        "ess": sum(raw) ** 2 / sum(w * w for w in raw) / n,
        "weight_mean": sum(min(w, 1.1) for w in raw) / n,
        "weight_zero": 0.0,
    }
    assert {name: summary[name] for name in exact} == pytest.approx(exact, rel=1e-9)


def test_the_percentile_sees_a_tail_that_the_mean_hides() -> None:
    # 2 of 100 tokens differ by 0.5 - 0.25, the others not at all.
    old = torch.cat([torch.full((2,), 0.5), torch.full((98,), 0.9)]).log()
    roll = torch.cat([torch.full((2,), 0.25), torch.full((98,), 0.9)]).log()
    summary = summarise_mismatch(stats(old, roll, torch.ones(100)))
    assert summary["prob_gap_mean"] == pytest.approx(0.005, rel=1e-5)
    assert summary["prob_gap_p99"] == pytest.approx(0.25, rel=1e-5)


def test_equal_log_probabilities_are_no_mismatch() -> None:
    old = torch.tensor([-0.1, -2.0])
    summary = summarise_mismatch(stats(old, old, torch.tensor([1.0, 0.0])))
    zero = ("prob_gap_mean", "prob_gap_max", "prob_gap_p99", "weight_outside", "kl", "chi2")
    assert all(summary[name] == 0.0 for name in zero)
    assert summary["ess"] == 1.0 and summary["weight_mean"] == 0.5 and summary["weight_zero"] == 0.5


def test_merged_micro_batches_give_the_summary_of_the_whole() -> None:
    old, roll, weights = random_tokens(1, 500)
    merged = stats(old[:0], roll[:0], weights[:0])
    for low, high in ((0, 7), (7, 400), (400, 500)):
        merged = merge(merged, stats(old[low:high], roll[low:high], weights[low:high]))
    whole = summarise_mismatch(stats(old, roll, weights))
    assert summarise_mismatch(merged) == pytest.approx(whole, rel=1e-12)


def coefficient_after(kl: float, samples: int) -> float:
    control = KlController(coef=1.0, target=0.1, horizon=10_000)
    control.update(kl, samples)
    return control.coef


def test_the_coefficient_moves_with_the_error_and_the_samples_and_never_below_zero() -> None:
    # e is -0.1, and -1 clipped to -0.2; 5,000 samples are half of it, and no round is more than all of it.
    assert coefficient_after(kl=0.09, samples=5_000) == pytest.approx(1 - 0.1 / 2)
    assert coefficient_after(kl=0.0, samples=5_000) == pytest.approx(1 - 0.2 / 2)
    assert coefficient_after(kl=0.0, samples=10_000) == pytest.approx(0.8)
    assert coefficient_after(kl=0.0, samples=65_536) == pytest.approx(0.8), "unbounded it is 1 - 0.2 * 6.5536 = -0.31"
    assert coefficient_after(kl=9.0, samples=65_536) == pytest.approx(1.2)
    assert coefficient_after(kl=0.1, samples=65_536) == 1.0
    fixed = KlController(coef=0.3, target=None, horizon=1)
    fixed.update(kl=5.0, samples=100)
    assert fixed.coef == 0.3
