"""The properties every advantage estimator has. Each is a function of a `Subject` that raises AssertionError, with one
sentence that says what was changed and what came of it. Pure: imports no pytest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_ds.config import RecipeError
from grpo_ds.conformance.subject import Batch, Subject, build_subject, make_batch, on_last_token

Property = Callable[[Subject], None]
PROPERTIES: dict[str, Property] = {}
"""Name -> property, in the order of the table."""

_TOLERANCE = 1e-4
"""Of each value, and of the largest one, for results that may be summed in another order in float32. Never absolute: an
estimator with small advantages must not pass because all of them are small."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    property: str
    passed: bool
    detail: str
    """Why it failed; empty where it passed."""


def check_estimator(name: str, options: Mapping[str, Any] | None = None, functions: int = 2) -> list[Result]:
    """Every property of estimator `name` with these options, tried with K = `functions` reward functions.

    Raises RecipeError where the estimator cannot be built at all.
    """
    subject = build_subject(name, options or {}, functions)
    return [_result(title, check, subject) for title, check in PROPERTIES.items()]


def estimator_suite(name: str, functions: int = 2, **options: Any) -> type:
    """A class for pytest with one test a property: `TestMine = estimator_suite("mine", scale=0.5)`."""

    def test(check: Property) -> Callable[[Any], None]:
        def run(self: Any) -> None:
            check(build_subject(name, options, functions))

        run.__doc__ = check.__doc__
        return run

    return type("EstimatorSuite", (), {f"test_{title.replace(' ', '_')}": test(p) for title, p in PROPERTIES.items()})


def _result(title: str, check: Property, subject: Subject) -> Result:
    try:
        check(subject)
    except AssertionError as error:
        return Result(title, False, str(error))
    except Exception as error:  # the estimator's own code: whatever it raises is its failure
        text = str(error).partition("\n")[0]
        return Result(title, False, f"it raised {type(error).__name__}: {text}")
    return Result(title, True, "")


def _property(title: str) -> Callable[[Property], Property]:
    def add(check: Property) -> Property:
        PROPERTIES[title] = check
        return check

    return add


def _same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], change: str, mask: Tensor | None = None) -> None:
    for name, a, b in zip(("advantages", "returns"), found, wanted, strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"{name} have shape {tuple(a.shape)} instead of {tuple(b.shape)} after {change}")
        atol = _TOLERANCE * _largest(b)
        off = ~torch.isclose(a.double(), b.double(), rtol=_TOLERANCE, atol=atol, equal_nan=True)
        off &= torch.ones_like(off) if mask is None else mask
        if bool(off.any()):
            i, t = off.nonzero()[0].tolist()
            raise AssertionError(
                f"{name} of sample {i}, token {t} went from {b[i, t]:.6g} to {a[i, t]:.6g} by {change}"
            )


def _largest(values: Tensor) -> float:
    """The largest absolute value that is finite; 0 where there is none."""
    return float(values.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if values.numel() else 0.0


def _finite(out: tuple[Tensor, Tensor], what: str) -> None:
    for name, value in zip(("advantages", "returns"), out, strict=True):
        bad = ~value.isfinite()
        if bool(bad.any()):
            i, t = bad.nonzero()[0].tolist()
            raise AssertionError(f"{name} of sample {i}, token {t} are {value[i, t]} with {what}")


@_property("shape and dtype")
def shape_and_dtype(subject: Subject) -> None:
    """Advantages and returns are float32 of shape (N, T), finite, and carry no gradient."""
    batch = subject.batch()
    out = subject.run(batch)
    for name, value in zip(("advantages", "returns"), out, strict=True):
        wanted = tuple(batch.response_mask.shape)
        assert tuple(value.shape) == wanted, f"{name} have shape {tuple(value.shape)}, not {wanted}"
        assert value.dtype == torch.float32, f"{name} are {value.dtype}, not torch.float32"
        assert not value.requires_grad, f"{name} require a gradient"
    _finite(out, "ordinary rewards")


@_property("zero outside the mask")
def zero_outside_the_mask(subject: Subject) -> None:
    """Advantages and returns are exactly 0 on padding and on tokens that the policy did not sample."""
    for dense in (False, True):
        batch = subject.batch(dense=dense)
        for name, value in zip(("advantages", "returns"), subject.run(batch), strict=True):
            bad = (value != 0) & ~batch.response_mask
            assert not bool(bad.any()), f"{name} are not 0 at (sample, token) {tuple(bad.nonzero()[0].tolist())}"


@_property("right padding")
def right_padding(subject: Subject) -> None:
    """Wider padding, and whatever stands in it, changes nothing."""
    for dense in (False, True):
        batch = subject.batch(dense=dense)
        width = batch.response_mask.shape[1]
        rewards = torch.where(batch.response_mask, batch.token_rewards, 123.0)
        wider = replace(
            batch,
            token_rewards=torch.nn.functional.pad(rewards, (0, 4), value=-77.0),
            response_mask=torch.nn.functional.pad(batch.response_mask, (0, 4)),
        )
        a, r = subject.run(wider)
        assert a.shape[1] == width + 4, f"advantages of {width + 4} tokens have {a.shape[1]} columns"
        cut = (a[:, :width], r[:, :width])
        _same(cut, subject.run(batch), "other padding", batch.response_mask)


@_property("permutation of samples")
def permutation_of_samples(subject: Subject) -> None:
    """The order of the samples does not matter: the results move with them."""
    for dense in (False, True):
        batch = subject.batch(dense=dense)
        order = torch.randperm(len(batch.group_index), generator=torch.Generator().manual_seed(1))
        a, r = subject.run(batch)
        _same(subject.run(batch.rows(order)), (a[order], r[order]), "reordering the samples")


@_property("relabelled groups")
def relabelled_groups(subject: Subject) -> None:
    """Group labels are names: any other distinct integers give the same."""
    batch = subject.batch()
    labels = torch.tensor([10**12, -3, 0, 7, -(10**9)])
    _same(subject.run(replace(batch, group_index=labels[batch.group_index])), subject.run(batch), "other group labels")


@_property("constant rewards")
def constant_rewards(subject: Subject) -> None:
    """Equal rewards give finite numbers; and 0, where adding 1 to every reward of a batch changes no advantage."""
    batch = subject.batch()
    rewards = torch.linspace(-1, 2, len(batch.group_index))
    base, shifted = (subject.run(batch.with_rewards(rewards + shift))[0].double() for shift in (0.0, 1.0))
    allowed = 1e-3 * _largest(base)
    relative = bool((base - shifted).abs().max() <= allowed)
    for constant in (0.0, 1.0, 0.7, 2.7):  # the mean of seven 0.7 in float32 is not 0.7
        out = subject.run(batch.with_rewards(torch.full_like(rewards, constant)))
        _finite(out, f"every reward {constant}")
        largest = _largest(out[0][batch.response_mask])
        assert not relative or largest <= allowed, (
            f"it compares rewards, yet equal rewards of {constant} give an advantage of {largest:.3g}"
        )


@_property("shaped rewards")
def shaped_rewards(subject: Subject) -> None:
    """Advantages follow token_rewards, which carry what shapes the reward, or `unshaped_rewards` is declared."""
    batch = subject.batch()
    shaped = torch.linspace(-1, 2, len(batch.group_index))[:, None] * batch.response_mask
    changed = not torch.equal(
        subject.run(batch)[0], subject.run(replace(batch, token_rewards=batch.token_rewards + shaped))[0]
    )
    assert changed or subject.needs["unshaped_rewards"], (
        "advantages do not change with token_rewards, so a penalty in the reward would be lost: declare unshaped_rewards"
    )


@_property("singleton and uneven groups")
def singleton_and_uneven_groups(subject: Subject) -> None:
    """Groups of any size from 1 work; below a declared min_group_size, a ValueError refuses the batch."""
    low = subject.smallest
    _finite(subject.run(make_batch((low, low + 4, low), seed=3, functions=subject.functions)), "uneven groups")
    if low > 1:
        small = make_batch((low, low - 1), seed=3, functions=subject.functions)
        _refused(subject, small, f"a group of {low - 1} (min_group_size is {low})")


@_property("extreme rewards")
def extreme_rewards(subject: Subject) -> None:
    """Rewards of 1e6, -1e6, 1e-6 and mixtures give finite numbers."""
    batch = subject.batch()
    order = batch.group_index.argsort()
    signs = torch.ones(len(order)).index_fill(0, order[::2], -1.0)  # both occur in every group
    kinds = {"1e6": signs * 1e6, "1e-6": signs * 1e-6, "1e6 and 1e-6": torch.where(signs > 0, 1e6, 1e-6)}
    for what, rewards in kinds.items():
        _finite(subject.run(batch.with_rewards(rewards)), f"rewards of {what}")


@_property("non-finite rewards")
def non_finite_rewards(subject: Subject) -> None:
    """NaN and infinity, wherever the trainer could bring them, are refused by a ValueError that names the sample."""
    batch = make_batch((max(2, subject.smallest) + 5,) * 20, seed=5, functions=subject.functions)
    firsts = torch.stack([(batch.group_index == group).nonzero()[0, 0] for group in range(20)])
    sample = int(firsts.max())  # its number is not one that a message has for another reason
    siblings = (batch.group_index == batch.group_index[sample]).nonzero()[:, 0]
    for value in (torch.nan, torch.inf, -torch.inf):
        rewards = torch.ones(len(batch.group_index)).index_fill(0, torch.tensor([sample]), value)
        bad = {"token_rewards": replace(batch, token_rewards=on_last_token(rewards, batch.response_mask))}
        if subject.needs["greedy_baseline"]:  # the whole group has it
            bad["greedy_rewards"] = replace(batch, greedy_rewards=batch.greedy_rewards.index_fill(0, siblings, value))
        if subject.needs["per_function_rewards"]:
            parts = batch.function_rewards.clone()
            parts[sample, -1] = value
            bad["function_rewards"] = replace(batch, function_rewards=parts)
        for what, wrong in bad.items():
            message = _refused(subject, wrong, f"a value of {value} in {what}")
            named = {int(number) for number in re.findall(r"\b\d+\b", message)}
            allowed = siblings.tolist() if what == "greedy_rewards" else [sample]
            assert named & set(allowed), f"the refusal of {value} in {what} does not name sample {sample}: {message}"


def _refused(subject: Subject, batch: Batch, what: str) -> str:
    try:
        subject.run(batch)
    except (ValueError, RecipeError) as error:
        return str(error)
    raise AssertionError(
        f"{what} is not refused: raise ValueError, as grpo_ds.estimators.base.check_batch and check_finite do"
    )


@_property("determinism")
def determinism(subject: Subject) -> None:
    """The same batch gives the same bits, whatever the random state."""
    batch = subject.batch()
    outs = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            outs.append(subject.run(batch))
    for name, a, b in zip(("advantages", "returns"), *outs, strict=True):
        assert torch.equal(a, b), f"{name} differ between two calls with the same batch"


@_property("inputs not modified")
def inputs_not_modified(subject: Subject) -> None:
    """The tensors it was given are as before."""
    for dense in (False, True):
        batch = subject.batch(dense=dense)
        given = batch.clone()
        subject.call(given)
        for name, before in vars(batch).items():
            assert torch.equal(before, getattr(given, name)), f"{name} was changed in place"


@_property("split over ranks")
def split_over_ranks(subject: Subject) -> None:
    """Ranks that hold whole groups each get what one process with the whole batch gets; with `whole_batch`, also beside
    a rank that holds none."""
    splits: list[tuple[tuple[int, ...], ...]] = [((0, 1, 2), (3, 4)), ((2,), (0, 4), (1, 3))]
    if subject.needs["whole_batch"]:  # a rank without groups must still take part in the sums
        splits.append(((), (0, 1, 2, 3, 4)))
    for dense in (False, True):
        batch = subject.batch(dense=dense)
        whole = subject.run(batch)
        for ranks in splits:
            labels = [torch.tensor(groups, dtype=torch.int64) for groups in ranks]
            parts = [torch.isin(batch.group_index, label).nonzero()[:, 0] for label in labels]
            hint = "" if subject.needs["whole_batch"] else " (statistics over groups need whole_batch and all_reduce)"
            _same(subject.run_on_ranks(batch, parts), whole, f"splitting the batch over {len(ranks)} ranks{hint}")
