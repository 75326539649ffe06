"""Every built-in estimator equals its formula, written here once more as plain loops over samples."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_ds.estimators import REGISTRY, get_estimator

Rows = list[list[float]]


def make_batch(seed: int, *, alone: bool = True) -> dict[str, Tensor]:
    """Uneven groups of 2 to 6 in mixed order (and one single response), ragged masks with holes, rewards on any token."""
    rng = random.Random(seed)
    sizes = [rng.randint(2, 6) for _ in range(5)] + ([1] if alone else [])
    labels = rng.sample(range(-1000, 1000), len(sizes))
    index = [label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]
    rng.shuffle(index)
    n, width = len(index), 9
    mask = [[int(t < 2 + i % 7 and (t == 0 or rng.random() < 0.7)) for t in range(width)] for i in range(n)]
    rewards = [[rng.gauss(0.3, 1) if rng.random() < 0.5 else 0.0 for _ in range(width)] for _ in range(n)]
    greedy = {label: rng.gauss(0, 1) for label in labels}
    return {
        "token_rewards": torch.tensor(rewards),
        "response_mask": torch.tensor(mask),
        "group_index": torch.tensor(index),
        "greedy_rewards": torch.tensor([greedy[label] for label in index]),
        "function_rewards": torch.tensor([[rng.gauss(0, 1), rng.choice([0.0, 1.0]), 5.0] for _ in range(n)]),
    }


def call(estimator: Any, batch: dict[str, Tensor], **extra: Any) -> tuple[Tensor, Tensor]:
    needs = REGISTRY.needs(estimator)
    if needs["greedy_baseline"]:
        extra["greedy_rewards"] = batch["greedy_rewards"]
    if needs["per_function_rewards"]:
        extra["function_rewards"] = batch["function_rewards"]
    return estimator(batch["token_rewards"], batch["response_mask"], batch["group_index"], **extra)


# The formulas: x holds Python lists, the result is the advantage of each token.


def sums(x: dict[str, Any]) -> list[float]:
    return [
        sum(r for r, m in zip(rs, ms, strict=True) if m)
        for rs, ms in zip(x["token_rewards"], x["response_mask"], strict=True)
    ]


def siblings(x: dict[str, Any], i: int) -> list[int]:
    return [j for j, label in enumerate(x["group_index"]) if label == x["group_index"][i]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float]) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / max(len(values) - 1, 1))


def on_tokens(x: dict[str, Any], per_sample: list[float]) -> Rows:
    return [[a if m else 0.0 for m in ms] for a, ms in zip(per_sample, x["response_mask"], strict=True)]


def normalised(x: dict[str, Any], values: list[float], by_std: bool) -> list[float]:
    out = []
    for i, value in enumerate(values):
        group = [values[j] for j in siblings(x, i)]
        if len(group) == 1:
            out.append(value / (1 + 1e-6) if by_std else value)
        else:
            out.append((value - mean(group)) / (std(group) + 1e-6 if by_std else 1.0))
    return out


def whitened(x: dict[str, Any], rows: Rows) -> Rows:
    flat = [v for vs, ms in zip(rows, x["response_mask"], strict=True) for v, m in zip(vs, ms, strict=True) if m]
    scale = math.sqrt(std(flat) ** 2 + 1e-8)
    return [
        [(v - mean(flat)) / scale if m else 0.0 for v, m in zip(vs, ms, strict=True)]
        for vs, ms in zip(rows, x["response_mask"], strict=True)
    ]


def scan(x: dict[str, Any], gamma: float) -> Rows:
    out = []
    for rs, ms in zip(x["token_rewards"], x["response_mask"], strict=True):
        running, row = 0.0, [0.0] * len(rs)
        for t in reversed(range(len(rs))):
            if ms[t]:
                running = rs[t] + gamma * running
                row[t] = running
        out.append(row)
    return out


def ref_grpo(x: dict[str, Any]) -> Rows:
    return on_tokens(x, normalised(x, sums(x), by_std=True))


def ref_dr_grpo(x: dict[str, Any]) -> Rows:
    return on_tokens(x, normalised(x, sums(x), by_std=False))


def ref_passk(x: dict[str, Any], by_std: bool = True) -> Rows:
    totals, out = sums(x), []
    for i, total in enumerate(totals):
        group = [totals[j] for j in siblings(x, i)]
        first, second = sorted(group, reverse=True)[:2]
        scale = std(group) + 1e-6 if by_std else 1.0
        out.append((first - second) / scale if total == first else 0.0)
    return on_tokens(x, out)


def ref_rloo(x: dict[str, Any]) -> Rows:
    totals, out = sums(x), []
    for i, total in enumerate(totals):
        others = [totals[j] for j in siblings(x, i) if j != i]
        out.append(total - (mean(others) if others else 0.0))
    return on_tokens(x, out)


def ref_rpp(x: dict[str, Any], gamma: float) -> Rows:
    return whitened(x, scan(x, gamma))


def ref_rpp_baseline(x: dict[str, Any]) -> Rows:
    return whitened(x, ref_dr_grpo(x))


def ref_remax(x: dict[str, Any]) -> Rows:
    return [
        [g - x["greedy_rewards"][i] if m else 0.0 for g, m in zip(row, x["response_mask"][i], strict=True)]
        for i, row in enumerate(scan(x, 1.0))
    ]


def ref_opo(x: dict[str, Any]) -> Rows:
    totals, lengths, out = sums(x), [sum(ms) for ms in x["response_mask"]], []
    for i, total in enumerate(totals):
        js = siblings(x, i)
        out.append(total - sum(lengths[j] * totals[j] for j in js) / sum(lengths[j] for j in js))
    return on_tokens(x, out)


def ref_gpg(x: dict[str, Any]) -> Rows:
    totals = sums(x)
    alpha = len(totals) / max(sum(t != 0 for t in totals), 1)
    return on_tokens(x, [alpha * (t - mean([totals[j] for j in siblings(x, i)])) for i, t in enumerate(totals)])


def ref_maxrl(x: dict[str, Any]) -> Rows:
    totals, out = sums(x), []
    for i, total in enumerate(totals):
        mu = mean([totals[j] for j in siblings(x, i)])
        out.append((total - mu) / mu if mu > 0 else 0.0)
    return on_tokens(x, out)


def ref_gdpo(x: dict[str, Any], weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Rows:
    total = [0.0] * len(x["group_index"])
    for k, weight in enumerate(weights):
        part = normalised(x, [row[k] for row in x["function_rewards"]], by_std=True)
        total = [a + weight * b for a, b in zip(total, part, strict=True)]
    return whitened(x, on_tokens(x, total))


CASES: list[tuple[str, dict[str, Any], Callable[[dict[str, Any]], Rows]]] = [
    ("grpo", {}, ref_grpo),
    ("grpo", {"norm_by_std": False}, ref_dr_grpo),
    ("grpo_vectorized", {}, ref_grpo),
    ("dr_grpo", {}, ref_dr_grpo),
    ("grpo_passk", {}, ref_passk),
    ("grpo_passk", {"norm_by_std": False}, lambda x: ref_passk(x, by_std=False)),
    ("rloo", {}, ref_rloo),
    ("reinforce_plus_plus", {}, lambda x: ref_rpp(x, 1.0)),
    ("reinforce_plus_plus", {"gamma": 0.9}, lambda x: ref_rpp(x, 0.9)),
    ("reinforce_plus_plus", {"gamma": 0.0}, lambda x: ref_rpp(x, 0.0)),
    ("reinforce_plus_plus_baseline", {}, ref_rpp_baseline),
    ("remax", {}, ref_remax),
    ("opo", {}, ref_opo),
    ("gpg", {}, ref_gpg),
    ("maxrl", {}, ref_maxrl),
    ("gdpo", {}, ref_gdpo),
    ("gdpo", {"weights": [0.5, 2.0, 3]}, lambda x: ref_gdpo(x, (0.5, 2.0, 3.0))),
]
ids = [f"{name}-{options}" for name, options, _ in CASES]


def test_every_built_in_is_compared_with_its_formula() -> None:
    assert {name for name, _, _ in CASES} == set(REGISTRY._builtin)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=ids)
def test_advantages_equal_the_formula(
    name: str, options: dict[str, Any], formula: Callable[[dict[str, Any]], Rows], seed: int
) -> None:
    batch = make_batch(seed, alone=name != "grpo_passk")
    advantages, returns = call(get_estimator(name, **options), batch)
    expected = formula({key: value.tolist() for key, value in batch.items()})
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert not advantages[batch["response_mask"] == 0].any() and not returns[batch["response_mask"] == 0].any()


# Multiples of 1/8 add up exactly in any order: whether a sum is 0 or two are equal is then no matter of rounding.
EIGHTHS = st.integers(-64, 64).map(lambda k: k / 8)


@st.composite
def batches(draw: st.DrawFn, smallest: int) -> dict[str, Tensor]:
    """Groups of `smallest` to 5 members in any order, masks with at least one token anywhere, rewards often equal."""
    sizes = draw(st.lists(st.integers(smallest, 5), min_size=1, max_size=4))
    labels = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(sizes), max_size=len(sizes), unique=True))
    index = draw(st.permutations([label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]))
    n, width = len(index), draw(st.integers(1, 6))
    value = draw(st.sampled_from([EIGHTHS, st.sampled_from([0.0, 1.0])]))

    def rows(of: st.SearchStrategy[Any], columns: int) -> list[list[Any]]:
        flat = draw(st.lists(of, min_size=n * columns, max_size=n * columns))
        return [flat[i * columns : (i + 1) * columns] for i in range(n)]

    mask = rows(st.booleans(), width)
    for row, keep in zip(mask, draw(st.lists(st.integers(0, width - 1), min_size=n, max_size=n)), strict=True):
        row[keep] = True
    greedy = dict(zip(labels, draw(st.lists(EIGHTHS, min_size=len(labels), max_size=len(labels))), strict=True))
    return {
        "token_rewards": torch.tensor(rows(value, width)),
        "response_mask": torch.tensor(mask),
        "group_index": torch.tensor(index),
        "greedy_rewards": torch.tensor([greedy[label] for label in index]),
        "function_rewards": torch.tensor(rows(value, 3)),
    }


@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=ids)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_advantages_equal_the_formula_on_any_groups_and_masks(
    name: str, options: dict[str, Any], formula: Callable[[dict[str, Any]], Rows], data: st.DataObject
) -> None:
    batch = data.draw(batches(int(REGISTRY.needs(name)["min_group_size"])))
    advantages, returns = call(get_estimator(name, **options), batch)
    expected = formula({key: value.tolist() for key, value in batch.items()})
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert not advantages[~batch["response_mask"]].any() and not returns[~batch["response_mask"]].any()


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "remax"])
def test_returns_are_the_rewards_to_go(name: str) -> None:
    batch = make_batch(1)
    expected = scan({key: value.tolist() for key, value in batch.items()}, 1.0)
    torch.testing.assert_close(call(get_estimator(name), batch)[1], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_returns_of_group_estimators_are_the_outcome_on_each_token() -> None:
    batch = make_batch(1)
    x = {key: value.tolist() for key, value in batch.items()}
    torch.testing.assert_close(call(get_estimator("rloo"), batch)[1], torch.tensor(on_tokens(x, sums(x))))


@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=ids)
def test_padding_on_the_right_changes_no_advantage(name: str, options: dict[str, Any], formula: Any) -> None:
    batch = make_batch(5, alone=False)
    wide = batch | {key: torch.nn.functional.pad(batch[key], (0, 6)) for key in ("token_rewards", "response_mask")}
    estimator = get_estimator(name, **options)
    for narrow, padded in zip(call(estimator, batch), call(estimator, wide), strict=True):
        torch.testing.assert_close(padded[:, : narrow.shape[1]], narrow, rtol=0, atol=1e-6)
        assert not padded[:, narrow.shape[1] :].any()


@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=ids)
def test_the_order_of_the_samples_does_not_matter(name: str, options: dict[str, Any], formula: Any) -> None:
    batch = make_batch(6, alone=False)
    order = torch.randperm(len(batch["group_index"]), generator=torch.Generator().manual_seed(3))
    estimator = get_estimator(name, **options)
    shuffled = call(estimator, {key: value[order] for key, value in batch.items()})
    for straight, other in zip(call(estimator, batch), shuffled, strict=True):
        torch.testing.assert_close(other, straight[order], rtol=0, atol=1e-6)


class Missing(Exception):
    """A rank waits for a sum that other ranks have not contributed to yet."""


class FakeReduce:
    """The collective calls of one rank: answers the sums known so far, then stops at the first unknown one."""

    def __init__(self, known: list[Tensor]) -> None:
        self.answers = iter(known)
        self.asked: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        assert value.dtype == torch.float64
        self.asked = value
        for answer in self.answers:
            return answer
        raise Missing


def run_on_ranks(estimator: Any, parts: list[dict[str, Tensor]]) -> list[Tensor]:
    """Each part as one rank: all are run up to the first sum that is not known, which then is, and so on."""
    known: list[Tensor] = []
    while True:
        results, asked = [], []
        for part in parts:
            reduce = FakeReduce(known)
            try:
                results.append(call(estimator, part, all_reduce=reduce)[0])
            except Missing:
                assert reduce.asked is not None
                asked.append(reduce.asked)
        if not asked:
            return results
        assert len(asked) == len(parts), "every rank makes the same collective calls"
        known.append(torch.stack(asked).sum(0))


WHOLE_BATCH = [case for case in CASES if REGISTRY.needs(case[0])["whole_batch"]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("name", "options", "formula"), WHOLE_BATCH, ids=[c[0] + str(c[1]) for c in WHOLE_BATCH])
def test_a_split_by_whole_groups_gives_the_same_advantages(
    name: str, options: dict[str, Any], formula: Any, ranks: int
) -> None:
    batch = make_batch(7)
    labels = batch["group_index"].unique()
    owner = torch.searchsorted(labels, batch["group_index"]) % ranks
    rows = [(owner == rank).nonzero().flatten() for rank in range(ranks)] + [torch.empty(0, dtype=torch.int64)]
    estimator = get_estimator(name, **options)
    results = run_on_ranks(estimator, [{key: value[at] for key, value in batch.items()} for at in rows])
    whole = call(estimator, batch)[0]
    for at, result in zip(rows, results, strict=True):
        torch.testing.assert_close(result, whole[at], rtol=0, atol=1e-6)


def test_only_whole_batch_estimators_depend_on_other_groups() -> None:
    batch = make_batch(8, alone=False)
    mine = batch["group_index"] == batch["group_index"][0]
    part = {key: value[mine] for key, value in batch.items()}
    for name in sorted(REGISTRY._builtin):
        estimator = get_estimator(name)
        same = torch.allclose(call(estimator, part)[0], call(estimator, batch)[0][mine], atol=1e-6)
        assert same != REGISTRY.needs(name)["whole_batch"], name
