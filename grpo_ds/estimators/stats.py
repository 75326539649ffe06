"""Vectorised building blocks of the estimators: group statistics, whitening, the discounted scan.

Everything inside is float64: a group's mean and deviation then carry no rounding that a float32 advantage could show.
Axes: N sequences, T tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sums a float64 tensor over all ranks and returns the sum; every rank calls it equally often."""

Ddof = Literal[0, 1]
"""Delta degrees of freedom: a variance divides by its count minus this."""


@dataclass(frozen=True)
class Groups:
    """Which sequence belongs to which group."""

    index: Tensor
    """(N,) int64, the group of each sequence, numbered 0 .. G-1."""
    sizes: Tensor
    """(G,) float64, sequences in each group."""

    def sum(self, values: Tensor) -> Tensor:
        """(N,) or (N, K) float64 -> (G,) or (G, K): the sum over each group."""
        out = values.new_zeros((len(self.sizes), *values.shape[1:]))
        return out.index_add_(0, self.index, values)

    def max(self, values: Tensor) -> Tensor:
        """(N,) -> (G,): the largest value of each group."""
        out = values.new_full((len(self.sizes),), -torch.inf)
        return out.scatter_reduce_(0, self.index, values, "amax")

    def min(self, values: Tensor) -> Tensor:
        """(N,) -> (G,): the smallest value of each group."""
        return -self.max(-values)

    def mean(self, values: Tensor) -> Tensor:
        """(N,) -> (G,): the mean of each group."""
        return self.sum(values) / self.sizes

    def deviation(self, values: Tensor) -> Tensor:
        """(N,) -> (N,): value minus its group's mean; exactly 0 in a group of equal values.

        The group's minimum is taken off first: the mean of n copies of 0.1 need not be 0.1 in floating point.

        >>> groups = find_groups(torch.tensor([5, 9, 5]))
        >>> groups.deviation(torch.tensor([1.0, 7.0, 3.0], dtype=torch.float64)).tolist()
        [-1.0, 0.0, 1.0]
        """
        shifted = values - self.min(values)[self.index]
        return shifted - self.mean(shifted)[self.index]

    def std(self, deviation: Tensor, ddof: Ddof) -> Tensor:
        """(N,) deviations -> (G,): standard deviation with divisor n - ddof; 0 where n <= ddof."""
        return (self.sum(deviation.square()) / (self.sizes - ddof).clamp(min=1)).sqrt()


def find_groups(group_index: Tensor) -> Groups:
    """Number the groups: (N,) int64 labels, in any order and with gaps, become 0 .. G-1.

    >>> find_groups(torch.tensor([7, -2, 7])).index.tolist()
    [1, 0, 1]
    """
    _, index, sizes = torch.unique(group_index, return_inverse=True, return_counts=True)
    return Groups(index=index, sizes=sizes.to(torch.float64))


def divide(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, and 0 where scale is 0: without an eps, values that do not differ have no deviation."""
    return torch.where(scale > 0, values / torch.where(scale > 0, scale, 1.0), 0.0)


def whiten(values: Tensor, mask: Tensor, *, eps: float, ddof: Ddof, all_reduce: AllReduce | None) -> Tensor:
    """(x - mean) / sqrt(var + eps) over all masked tokens of all ranks; 0 where the mask is False.

    Args: values (N, T) float64, mask (N, T) bool. `all_reduce` None: this process holds the whole batch. The variance
    is two-pass (mean first, then centred squares), so it does not cancel; its divisor is tokens - ddof, at least 1.

    >>> values = torch.tensor([[1.0, 3.0, 9.0]], dtype=torch.float64)
    >>> whiten(values, torch.tensor([[True, True, False]]), eps=0.0, ddof=0, all_reduce=None).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    add = all_reduce or (lambda tensor: tensor)
    total = torch.where(mask, values, 0.0).sum()
    count, total = add(torch.stack([mask.count_nonzero().to(torch.float64), total])).unbind()
    centred = (values - total / count.clamp(min=1)).masked_fill_(~mask, 0.0)
    flat = centred.flatten()
    squares = add(flat.dot(flat).reshape(1))
    return centred.mul_(divide(torch.ones_like(squares), (squares / (count - ddof).clamp(min=1) + eps).sqrt()))


def rewards_to_go(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} backwards over the masked tokens; other positions carry G unchanged and return 0.

    Args: token_rewards (N, T) float64, mask (N, T) bool. Below gamma 1 the recurrence is solved by doubling: after
    step k each position knows the next 2^k ones, so log2(T) passes do, and no power of 1/gamma (which overflows) occurs.

    >>> rewards = torch.tensor([[0.0, 5.0, 0.0, 4.0]], dtype=torch.float64)
    >>> rewards_to_go(rewards, torch.tensor([[True, False, True, True]]), gamma=0.5).tolist()
    [[1.0, 0.0, 2.0, 4.0]]
    """
    total = torch.where(mask, token_rewards, 0.0)
    if gamma == 1.0:
        total = total.flip(1).cumsum_(1).flip(1)
    else:
        decay = torch.ones_like(total).masked_fill_(mask, gamma)
        step = 1
        while step < total.shape[1]:
            total[:, :-step] += decay[:, :-step] * total[:, step:]
            decay[:, :-step] = decay[:, :-step] * decay[:, step:]
            step *= 2
    return total.masked_fill_(~mask, 0.0)


def check_not_negative(**options: float) -> None:
    """ValueError for a negative option."""
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}, it must not be negative")
