"""Estimators that compare a response with the other responses to its prompt; one advantage for a whole response.

R_i is the sum of a response's token rewards, mu_g and sigma_g the mean and standard deviation of R in its group, n the
group's size. `returns` is R_i on each response token. In the examples below three responses have one token each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from grpo_ds.estimators.base import Batch, check_batch, register
from grpo_ds.estimators.stats import AllReduce, Ddof, Groups, check_not_negative, divide

Singleton = Literal["reward", "zero"]


def group_advantages(
    totals: Tensor, groups: Groups, *, norm_by_std: bool, eps: float, ddof: Ddof, singleton: Singleton
) -> Tensor:
    """(R - mu_g) or (R - mu_g) / (sigma_g + eps), (N,) float64. A group of one: mu = 0 and sigma = 1, or advantage 0."""
    alone = groups.sizes == 1
    advantages = groups.deviation(totals)
    scale = torch.where(alone, 1.0, groups.std(advantages, ddof)) + eps
    if singleton == "reward":
        advantages = torch.where(alone[groups.index], totals, advantages)
    return divide(advantages, scale[groups.index]) if norm_by_std else advantages


def _outcome(batch: Batch, advantages: Tensor) -> tuple[Tensor, Tensor]:
    return batch.spread(advantages), batch.spread(batch.totals)


@register("grpo")
@dataclass(frozen=True, kw_only=True)
class Grpo:
    """A_i = (R_i - mu_g) / (sigma_g + eps).  arXiv 2402.03300

    >>> estimator = Grpo(eps=0.0)
    >>> advantages, _ = estimator(torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3, 1), torch.tensor([0, 0, 0]))
    >>> advantages.flatten().tolist()
    [-1.0, 0.0, 1.0]
    """

    norm_by_std: bool = True
    """Divide by the group's standard deviation."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    ddof: Ddof = 1
    """The variance divides by n - ddof."""
    singleton: Singleton = "reward"
    """Advantage of a response without siblings: its reward (mu = 0, sigma = 1), or zero."""

    min_group_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_not_negative(eps=self.eps)

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        advantages = group_advantages(
            batch.totals,
            batch.groups,
            norm_by_std=self.norm_by_std,
            eps=self.eps,
            ddof=self.ddof,
            singleton=self.singleton,
        )
        return _outcome(batch, advantages)


@register("grpo_vectorized")
@dataclass(frozen=True, kw_only=True)
class GrpoVectorized(Grpo):
    """The same numbers as `grpo`; a name kept for recipes that use it."""


@register("dr_grpo")
@dataclass(frozen=True, kw_only=True)
class DrGrpo:
    """A_i = R_i - mu_g: `grpo` without the division by the standard deviation.  arXiv 2503.20783

    >>> advantages, _ = DrGrpo()(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1), torch.tensor([0, 0, 0]))
    >>> advantages.flatten().tolist()
    [-2.0, -1.0, 3.0]
    """

    singleton: Singleton = "reward"
    """Advantage of a response without siblings: its reward (mu = 0), or zero."""

    norm_by_std: ClassVar[bool] = False  # so a recipe may say so

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        advantages = group_advantages(
            batch.totals, batch.groups, norm_by_std=False, eps=0.0, ddof=1, singleton=self.singleton
        )
        return _outcome(batch, advantages)


@register("grpo_passk")
@dataclass(frozen=True, kw_only=True)
class GrpoPassk:
    """The best response of a group gets (r_1st - r_2nd) / (sigma_g + eps), all others 0.  arXiv 2503.19595

    A tie for the best gives 0 to all. A group of one is an error: it has no second.

    >>> estimator = GrpoPassk(norm_by_std=False)
    >>> advantages, _ = estimator(torch.tensor([[1.0], [2.0], [5.0]]), torch.ones(3, 1), torch.tensor([0, 0, 0]))
    >>> advantages.flatten().tolist()
    [0.0, 0.0, 3.0]
    """

    norm_by_std: bool = True
    """Divide by the group's standard deviation."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    ddof: Ddof = 1
    """The variance divides by n - ddof."""

    min_group_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_not_negative(eps=self.eps)

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index, min_group_size=self.min_group_size)
        totals, groups = batch.totals, batch.groups
        best = groups.max(totals)
        is_best = totals == best[groups.index]
        second = groups.max(torch.where(is_best, -torch.inf, totals))
        tied = groups.sum(is_best.to(torch.float64)) > 1
        margin = torch.where(tied, 0.0, best - second)
        if self.norm_by_std:
            margin = divide(margin, groups.std(groups.deviation(totals), self.ddof) + self.eps)
        return _outcome(batch, torch.where(is_best, margin[groups.index], 0.0))


@register("rloo")
@dataclass(frozen=True, kw_only=True)
class Rloo:
    """A_i = R_i - mean of the others = n / (n - 1) * (R_i - mu_g).  arXiv 2402.14740

    >>> advantages, _ = Rloo()(torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1), torch.tensor([0, 0, 0]))
    >>> advantages.flatten().tolist()
    [-3.0, -1.5, 4.5]
    """

    singleton: Singleton = "reward"
    """Advantage of a response without siblings: its reward, or zero."""

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        sizes = batch.groups.sizes
        factor = torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1), 1.0)[batch.groups.index]
        centred = group_advantages(
            batch.totals, batch.groups, norm_by_std=False, eps=0.0, ddof=1, singleton=self.singleton
        )
        return _outcome(batch, factor * centred)


@register("opo")
@dataclass(frozen=True, kw_only=True)
class Opo:
    """A_i = R_i - b_g with the length-weighted baseline b_g = sum L_j R_j / sum L_j.  arXiv 2505.23585

    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> advantages, _ = Opo()(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), mask, torch.tensor([0, 0]))
    >>> advantages.tolist()
    [[0.25, 0.25, 0.25], [-0.75, 0.0, 0.0]]
    """

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        groups, lengths = batch.groups, batch.mask.sum(1).to(torch.float64)
        # The group's minimum is taken off first, so that equal rewards give exactly 0.
        shifted = batch.totals - groups.min(batch.totals)[groups.index]
        baseline = groups.sum(lengths * shifted) / groups.sum(lengths)
        return _outcome(batch, shifted - baseline[groups.index])


@register("gpg")
@dataclass(frozen=True, kw_only=True)
class Gpg:
    """A_i = alpha * (R_i - mu_g), alpha = N / max(number of i with R_i != 0, 1) over the whole batch.  arXiv 2504.02546

    >>> advantages, _ = Gpg()(torch.tensor([[0.0], [0.0], [3.0]]), torch.ones(3, 1), torch.tensor([0, 0, 0]))
    >>> advantages.flatten().tolist()
    [-3.0, -3.0, 6.0]
    """

    whole_batch: ClassVar[bool] = True

    def __call__(
        self,
        token_rewards: Tensor,
        response_mask: Tensor,
        group_index: Tensor,
        greedy_rewards: Tensor | None = None,
        *,
        all_reduce: AllReduce | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        totals = batch.totals
        counts = torch.stack([torch.ones_like(totals).sum(), (totals != 0).to(torch.float64).sum()])
        sequences, rewarded = (all_reduce(counts) if all_reduce else counts).unbind()
        return _outcome(batch, sequences / rewarded.clamp(min=1) * batch.groups.deviation(totals))


@register("maxrl")
@dataclass(frozen=True, kw_only=True)
class MaxRl:
    """A_i = (R_i - mu_g) / mu_g where mu_g > 0, else 0.

    >>> advantages, _ = MaxRl()(torch.tensor([[0.0], [1.0], [2.0]]), torch.ones(3, 1), torch.tensor([0, 0, 0]))
    >>> advantages.flatten().tolist()
    [-1.0, 0.0, 1.0]
    """

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        mean = batch.groups.mean(batch.totals)[batch.groups.index]
        deviation = batch.groups.deviation(batch.totals)
        return _outcome(batch, divide(deviation, mean))
