"""Policy losses and the reduction, against their formulas as plain loops over tokens."""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ds.config import RecipeError
from grpo_ds.losses import MODES, REGISTRY, Totals, aggregate, get_policy_loss


def make_tokens(seed: int, sequences: int = 7) -> dict[str, Tensor]:
    """Uneven sequences, ratios on both sides of every clip, advantages of both signs, one token and one sequence at 0."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 6) for _ in range(sequences)]
    index = [i for i, length in enumerate(lengths) for _ in range(length)]
    signs = [rng.choice([-1.0, 1.0]) for _ in range(sequences)]
    old = torch.tensor([rng.uniform(-4, -0.1) for _ in index], dtype=torch.float64)
    advantages = [signs[i] * rng.uniform(0.1, 2) if i else 0.0 for i in index]
    return {
        "logprobs": old + torch.tensor([rng.gauss(0, 0.7) for _ in index], dtype=torch.float64),
        "old_logprobs": old,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "sequence_index": torch.tensor(index),
    }


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


Formula = Callable[[list[float], list[float], list[float], list[list[int]]], list[float]]


def ref_vanilla(low: float = 0.2, high: float = 0.2, dual: float | None = None) -> Formula:
    def formula(lp: list[float], old: list[float], adv: list[float], seqs: list[list[int]]) -> list[float]:
        out = []
        for x, y, a in zip(lp, old, adv, strict=True):
            ratio = math.exp(x - y)
            loss = max(-a * ratio, -a * clip(ratio, 1 - low, 1 + high))
            out.append(min(-a * dual, loss) if dual and a < 0 else loss)
        return out

    return formula


def ref_gspo(lp: list[float], old: list[float], adv: list[float], seqs: list[list[int]]) -> list[float]:
    out = [0.0] * len(lp)
    for tokens in seqs:
        ratio = math.exp(sum(lp[t] - old[t] for t in tokens) / len(tokens))
        for t in tokens:
            out[t] = max(-adv[t] * ratio, -adv[t] * clip(ratio, 0.8, 1.2))
    return out


def ref_cispo(lp: list[float], old: list[float], adv: list[float], seqs: list[list[int]]) -> list[float]:
    return [-clip(math.exp(x - y), 0.8, 1.28) * a * x for x, y, a in zip(lp, old, adv, strict=True)]


def ref_sapo(lp: list[float], old: list[float], adv: list[float], seqs: list[list[int]]) -> list[float]:
    out = []
    for x, y, a in zip(lp, old, adv, strict=True):
        tau = 1.0 if a > 0 else 1.05
        out.append(-a * 4 / tau / (1 + math.exp(-tau * (math.exp(x - y) - 1))))
    return out


def ref_gmpo(lp: list[float], old: list[float], adv: list[float], seqs: list[list[int]]) -> list[float]:
    out = [0.0] * len(lp)
    for tokens in seqs:
        held = [min(lp[t] - old[t], 0.4) if adv[t] > 0 else max(lp[t] - old[t], -0.3) for t in tokens]
        for t in tokens:
            out[t] = -adv[t] * math.exp(sum(held) / len(held))
    return out


def ref_reinforce(lp: list[float], old: list[float], adv: list[float], seqs: list[list[int]]) -> list[float]:
    return [-a * x for x, a in zip(lp, adv, strict=True)]


CASES: list[tuple[str, dict[str, Any], Formula]] = [
    ("vanilla", {}, ref_vanilla()),
    ("vanilla", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28}, ref_vanilla(0.1, 0.28)),
    ("vanilla", {"dual_clip": 1.5}, ref_vanilla(dual=1.5)),
    ("gspo", {}, ref_gspo),
    ("cispo", {"clip_ratio_high": 0.28}, ref_cispo),
    ("sapo", {}, ref_sapo),
    ("gmpo", {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4}, ref_gmpo),
    ("gpg", {}, ref_reinforce),
    ("reinforce", {}, ref_reinforce),
]


def test_every_built_in_is_compared_with_its_formula() -> None:
    assert {name for name, _, _ in CASES} == set(REGISTRY._builtin)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=[f"{n}-{o}" for n, o, _ in CASES])
def test_token_losses_equal_the_formula(name: str, options: dict[str, Any], formula: Formula, seed: int) -> None:
    tokens = make_tokens(seed)
    loss, stats = get_policy_loss(name, **options)(**tokens)
    index = tokens["sequence_index"].tolist()
    seqs = [[t for t, i in enumerate(index) if i == sequence] for sequence in sorted(set(index))]
    lp, old, advantages = (tokens[key].tolist() for key in ("logprobs", "old_logprobs", "advantages"))
    expected = formula(lp, old, advantages, seqs)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    ratio = (tokens["logprobs"] - tokens["old_logprobs"]).exp()
    assert stats["ratio_sum"].item() == pytest.approx(ratio.sum().item(), rel=1e-5)
    assert stats["kl_old_sum"].item() == pytest.approx((ratio - 1 - ratio.log()).sum().item(), rel=1e-4)


def gradient(name: str, logprob: float, advantage: float, **options: Any) -> float:
    """d loss / d logprob of one token whose old log-probability is 0."""
    lp = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss, _ = get_policy_loss(name, **options)(lp, zero, zero + advantage, torch.tensor([0]))
    return torch.autograd.grad(loss.sum(), lp)[0].item()


def test_gradients_at_the_clip() -> None:
    log = math.log
    assert gradient("vanilla", log(1.1), 2.0) == pytest.approx(-2.2)
    assert gradient("vanilla", log(1.3), 2.0) == 0.0
    assert gradient("vanilla", log(1.3), 2.0, clip_ratio_high=0.5) == pytest.approx(-2.6)
    assert gradient("vanilla", log(0.7), -2.0) == 0.0
    assert gradient("vanilla", log(3.0), -2.0) == pytest.approx(6.0)
    assert gradient("vanilla", log(3.0), -2.0, dual_clip=2.0) == 0.0
    assert gradient("cispo", log(3.0), 2.0) == pytest.approx(-2.4)
    assert gradient("gspo", log(1.1), 2.0) == pytest.approx(-2.2)
    assert gradient("reinforce", log(3.0), 2.0) == -2.0


@pytest.mark.parametrize("name", sorted(set(REGISTRY._builtin)))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    # With lp = lp_old the gradient of each loss is -A. gmpo spreads it over its sequence, here of one token.
    assert gradient(name, 0.0, 1.5) == pytest.approx(-1.5)


def test_gspo_gives_every_token_the_ratio_of_its_sequence_and_its_own_gradient() -> None:
    lp = torch.tensor([0.1, -0.1, 0.05], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    loss, _ = get_policy_loss("gspo")(lp, zero, zero + 1.0, torch.tensor([0, 0, 1]))
    loss.sum().backward()
    assert lp.grad is not None
    assert lp.grad.tolist() == pytest.approx([-1.0, -1.0, -math.exp(0.05)])


@pytest.mark.parametrize(
    ("name", "options", "q", "advantage", "log_ratio"),
    [
        ("gspo", {"clip_ratio_low": 1.0}, (-30.0, 26.0), 1.0, -2.0),  # (-20 + 20) / 2 = 0 if each token were clamped
        ("gspo", {"clip_ratio_low": 1.0}, (-90.0, 10.0), 1.0, -20.0),
        ("gmpo", {}, (-30.0, 0.0), 1.0, -15.0),
        ("gmpo", {"clip_ratio_low": 0.3}, (30.0, -0.4), -1.0, 14.85),
        ("gmpo", {}, (90.0, 10.0), -1.0, 20.0),
    ],
)
def test_the_ratio_of_a_sequence_is_clamped_where_its_exp_is_taken_and_no_token_before(
    name: str, options: dict[str, Any], q: tuple[float, float], advantage: float, log_ratio: float
) -> None:
    lp, zero = torch.tensor(q, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    loss, _ = get_policy_loss(name, **options)(lp, zero, zero + advantage, torch.tensor([0, 0]))
    assert loss.tolist() == pytest.approx([-advantage * math.exp(log_ratio)] * 2)


@pytest.mark.parametrize("name", sorted(set(REGISTRY._builtin)))
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_an_extreme_ratio_overflows_nowhere(name: str, gap: float) -> None:
    lp = torch.tensor([gap], requires_grad=True)
    for advantage in (-1.0, 1.0):
        loss, stats = get_policy_loss(name)(lp, torch.zeros(1), torch.tensor([advantage]), torch.tensor([0]))
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), lp)[0].isfinite().all()
        assert all(value.isfinite() for value in stats.values())


@pytest.mark.parametrize("name", sorted(set(REGISTRY._builtin)))
def test_an_empty_micro_batch_gives_a_loss_that_can_be_differentiated(name: str) -> None:
    lp, empty, index = torch.zeros(0, requires_grad=True), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    loss, stats = get_policy_loss(name)(lp, empty, empty, index)
    for mode in MODES:
        share = aggregate(loss, index, mode, Totals(0, 0, 8))
        assert share.item() == 0.0 and torch.autograd.grad(share, lp, retain_graph=True)[0].shape == (0,)
    assert all(value.item() == 0 for value in stats.values())


def test_stats_count_tokens_and_carry_no_gradient() -> None:
    ratios, signs = [0.5, 0.5, 1.0, 2.0, 2.0, 4.0], [-1.0, 1.0, 1.0, 1.0, -1.0, -1.0]
    lp = torch.tensor(ratios).log().requires_grad_()
    args = lp, torch.zeros(6), torch.tensor(signs), torch.arange(6)
    _, stats = get_policy_loss("vanilla", dual_clip=3.0)(*args)
    counts = {name: value.item() for name, value in stats.items() if name.endswith("_tokens")}
    assert counts == {"clip_low_tokens": 1, "clip_high_tokens": 1, "dual_clip_tokens": 1}
    assert stats["ratio_sum"].item() == pytest.approx(10.0)
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vanilla", {"dual_clip": 1.0}, "dual_clip is 1.0, it must be above 1"),
        ("vanilla", {"clip_ratio_low": -0.1}, "neither may be negative"),
        ("sapo", {"tau_pos": 0.0}, "both must be positive"),
        ("sapo", {"clip_ratio_low": 0.2}, "has no option 'clip_ratio_low'"),
        ("vanila", {}, "did you mean 'vanilla'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        get_policy_loss(name, **options)


def ref_aggregate(loss: list[float], index: list[int], mode: str, longest: int) -> float:
    seqs = [[v for v, i in zip(loss, index, strict=True) if i == s] for s in sorted(set(index))]
    if mode == "token-mean":
        return sum(loss) / len(loss)
    if mode == "seq-mean-token-mean":
        return sum(sum(seq) / len(seq) for seq in seqs) / len(seqs)
    total = sum(sum(seq) for seq in seqs) / len(seqs)
    return total if mode == "seq-mean-token-sum" else total / longest


def split(tokens: dict[str, Tensor], cuts: list[int]) -> list[dict[str, Tensor]]:
    """Micro-batches of whole sequences, each with its own sequence numbers from 0; cuts may repeat (empty ones)."""
    parts = []
    for low, high in itertools.pairwise(cuts):
        inside = (tokens["sequence_index"] >= low) & (tokens["sequence_index"] < high)
        part = {key: value[inside] for key, value in tokens.items()}
        parts.append(part | {"sequence_index": part["sequence_index"] - low})
    return parts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["vanilla", "gspo", "gmpo"])
def test_value_and_gradient_do_not_depend_on_the_split_into_micro_batches(name: str, mode: str) -> None:
    sequences, longest, rng = 7, 50, random.Random(11)
    for seed in range(5):
        tokens = make_tokens(seed, sequences)
        lp = tokens["logprobs"].requires_grad_()
        totals, policy_loss = Totals(len(lp), sequences, longest), get_policy_loss(name)
        loss, _ = policy_loss(**tokens)
        whole = aggregate(loss, tokens["sequence_index"], mode, totals)
        expected = ref_aggregate(loss.tolist(), tokens["sequence_index"].tolist(), mode, longest)
        assert whole.item() == pytest.approx(expected, rel=1e-12)
        (gradient,) = torch.autograd.grad(whole, lp)
        for _ in range(5):
            cuts = sorted([0, sequences, *(rng.randint(0, sequences) for _ in range(rng.randint(0, 6)))])
            shares = [
                aggregate(policy_loss(**part)[0], part["sequence_index"], mode, totals) for part in split(tokens, cuts)
            ]
            total = torch.stack(shares).sum()
            assert total.item() == pytest.approx(expected, rel=1e-12)
            torch.testing.assert_close(torch.autograd.grad(total, lp)[0], gradient, rtol=1e-12, atol=1e-15)


def test_the_normalised_sum_divides_by_the_recipe_length_not_by_what_is_there() -> None:
    loss, index = torch.tensor([2.0, 4.0]), torch.tensor([0, 0])
    assert aggregate(loss, index, "seq-mean-token-sum-norm", Totals(2, 1, 12)).item() == 0.5


def test_aggregate_refuses_unknown_modes_and_totals_of_less_than_the_step() -> None:
    loss, index = torch.ones(3), torch.tensor([0, 0, 1])
    with pytest.raises(RecipeError, match="no loss aggregation is called 'mean'.*token-mean, seq-mean-token-mean"):
        aggregate(loss, index, "mean", Totals(3, 2, 8))
    with pytest.raises(ValueError, match="must count the whole step"):
        aggregate(loss, index, "token-mean", Totals(2, 2, 8))
    with pytest.raises(ValueError, match="differ in shape"):
        aggregate(loss, index[:2], "token-mean", Totals(3, 2, 8))
