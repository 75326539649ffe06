"""Estimators whose advantage differs from token to token, or is whitened over the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_ds.estimators.base import check_batch, check_finite, register
from grpo_ds.estimators.group import Singleton, group_advantages
from grpo_ds.estimators.stats import AllReduce, Ddof, check_not_negative, rewards_to_go, whiten


@register("reinforce_plus_plus")
@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus:
    """A = whiten(G) with G_t = r_t + gamma * G_{t+1}; `returns` is G.  arXiv 2501.03262

    Positions outside the mask (tool output) carry G unchanged. Whitening is over all response tokens of all ranks.

    >>> mask = torch.tensor([[1, 1], [1, 1]])
    >>> estimator = ReinforcePlusPlus(whiten_eps=0.0, ddof=0)
    >>> advantages, returns = estimator(torch.tensor([[0.0, 4.0], [0.0, 0.0]]), mask, torch.tensor([0, 0]))
    >>> advantages.tolist(), returns.tolist()
    ([[1.0, 1.0], [-1.0, -1.0]], [[4.0, 4.0], [0.0, 0.0]])
    """

    gamma: float = 1.0
    """Discount of later rewards."""
    whiten_eps: float = 1e-8
    """Added to the variance."""
    ddof: Ddof = 1
    """The variance divides by tokens - ddof."""

    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(whiten_eps=self.whiten_eps)
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma is {self.gamma}, it must lie in [0, 1]")

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
        returns = rewards_to_go(batch.rewards, batch.mask, self.gamma)
        advantages = whiten(returns, batch.mask, eps=self.whiten_eps, ddof=self.ddof, all_reduce=all_reduce)
        return advantages.to(torch.float32), returns.to(torch.float32)


@register("reinforce_plus_plus_baseline")
@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlusBaseline:
    """A = whiten(R_i - mu_g on each response token), whitened over all response tokens of all ranks; `returns` is R_i.

    >>> estimator = ReinforcePlusPlusBaseline(whiten_eps=0.0, ddof=0)
    >>> advantages, _ = estimator(torch.tensor([[9.0], [5.0]]), torch.ones(2, 1), torch.tensor([0, 0]))
    >>> advantages.flatten().tolist()
    [1.0, -1.0]
    """

    whiten_eps: float = 1e-8
    """Added to the variance."""
    ddof: Ddof = 1
    """The variance divides by tokens - ddof."""
    singleton: Singleton = "reward"
    """Before whitening, a response without siblings has its reward (mu = 0), or zero."""

    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(whiten_eps=self.whiten_eps)

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
        centred = group_advantages(
            batch.totals, batch.groups, norm_by_std=False, eps=0.0, ddof=1, singleton=self.singleton
        )
        advantages = whiten(
            centred[:, None].expand_as(batch.mask),
            batch.mask,
            eps=self.whiten_eps,
            ddof=self.ddof,
            all_reduce=all_reduce,
        )
        return advantages.to(torch.float32), batch.spread(batch.totals)


@register("remax")
@dataclass(frozen=True, kw_only=True)
class Remax:
    """A_t = sum over s >= t of r_s - R_greedy, the reward of a greedy response to the same prompt.  arXiv 2310.10505

    `greedy_rewards` (N,): for each sequence the reward of its prompt's greedy response. `returns` is the reward-to-go.

    >>> rewards, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2)
    >>> Remax()(rewards, mask, torch.tensor([0]), greedy_rewards=torch.tensor([0.5]))[0].tolist()
    [[2.5, 1.5]]
    """

    greedy_baseline: ClassVar[bool] = True

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        given = 0 if greedy_rewards is None else greedy_rewards.numel()
        if greedy_rewards is None or greedy_rewards.shape != group_index.shape:
            raise ValueError(
                f"remax needs greedy_rewards, one for each of the {len(group_index)} samples: sample "
                f"{min(given, len(group_index))} is the first without a partner"
            )
        check_finite("greedy_rewards", greedy_rewards)
        returns = rewards_to_go(batch.rewards, batch.mask, gamma=1.0)
        advantages = torch.where(batch.mask, returns - greedy_rewards.to(torch.float64)[:, None], 0.0)
        return advantages.to(torch.float32), returns.to(torch.float32)


@register("gdpo")
@dataclass(frozen=True, kw_only=True)
class Gdpo:
    """Each reward function is normalised in its group as in `grpo`, then summed with weights, then whitened.

    `function_rewards` (N, K): the value of each reward function for each sequence. `returns` is R_i. Whitening is over
    all response tokens of all ranks. Shaping of the summed reward has no place here: beside values in units of their
    standard deviation its size would mean nothing, and normalised it would lose its size; so it is refused.

    >>> parts = torch.tensor([[1.0, 100.0], [3.0, 100.0]])
    >>> estimator = Gdpo(whiten_eps=0.0, ddof=0)
    >>> args = torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0, 0])
    >>> estimator(*args, function_rewards=parts)[0].flatten().tolist()
    [-1.0, 1.0]
    """

    weights: list[float] | None = None
    """Weight of each reward function; null: those of `reward.weights`, else 1 each."""
    norm_by_std: bool = True
    """Divide by the group's standard deviation."""
    eps: float = 1e-6
    """Added to the standard deviation of the group."""
    ddof: Ddof = 1
    """Variances divide by n - ddof, of the group and of the batch."""
    singleton: Singleton = "reward"
    """A response without siblings has its reward (mu = 0, sigma = 1), or zero."""
    whiten_eps: float = 1e-8
    """Added to the variance of the batch."""

    whole_batch: ClassVar[bool] = True
    per_function_rewards: ClassVar[bool] = True
    unshaped_rewards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(eps=self.eps, whiten_eps=self.whiten_eps)

    def __call__(
        self,
        token_rewards: Tensor,
        response_mask: Tensor,
        group_index: Tensor,
        greedy_rewards: Tensor | None = None,
        *,
        function_rewards: Tensor,
        all_reduce: AllReduce | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch = check_batch(token_rewards, response_mask, group_index)
        weights = self._weights(function_rewards, len(group_index))
        total = torch.zeros_like(batch.totals)
        for values, weight in zip(function_rewards.to(torch.float64).unbind(1), weights, strict=True):
            total = total + weight * group_advantages(
                values,
                batch.groups,
                norm_by_std=self.norm_by_std,
                eps=self.eps,
                ddof=self.ddof,
                singleton=self.singleton,
            )
        advantages = whiten(
            total[:, None].expand_as(batch.mask),
            batch.mask,
            eps=self.whiten_eps,
            ddof=self.ddof,
            all_reduce=all_reduce,
        )
        return advantages.to(torch.float32), batch.spread(batch.totals)

    def _weights(self, function_rewards: Tensor, samples: int) -> list[float]:
        if function_rewards.dim() != 2 or len(function_rewards) != samples:
            raise ValueError(
                f"function_rewards has shape {tuple(function_rewards.shape)} for {samples} samples: sample "
                f"{min(samples, len(function_rewards))} is the first without a partner; give (samples, functions)"
            )
        check_finite("function_rewards", function_rewards)
        functions = function_rewards.shape[1]
        weights = [1.0] * functions if self.weights is None else self.weights
        if len(weights) != functions:
            raise ValueError(f"gdpo has {len(weights)} weights for {functions} reward functions: give one a function")
        return weights
