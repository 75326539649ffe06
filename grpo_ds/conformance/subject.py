"""The estimator under test, called as the trainer calls it, and the batches it is called with. Pure: no pytest."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_ds.estimators import REGISTRY, AllReduce

_RANK_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Batch:
    """What the trainer hands to an estimator."""

    token_rewards: Tensor
    """(N, T) float32; 0 outside the mask unless a property writes something there."""
    response_mask: Tensor
    """(N, T) bool."""
    group_index: Tensor
    """(N,) int64."""
    greedy_rewards: Tensor
    """(N,) float32, the same value within a group."""
    function_rewards: Tensor
    """(N, K) float32."""

    def rows(self, index: Tensor) -> Batch:
        """The sequences `index`, in that order."""
        return Batch(**{name: value[index] for name, value in vars(self).items()})

    def clone(self) -> Batch:
        """A copy that shares no memory."""
        return Batch(**{name: value.clone() for name, value in vars(self).items()})

    def with_rewards(self, rewards: Tensor) -> Batch:
        """Every reward of a response becomes (N,) `rewards`, placed on its last token."""
        return replace(
            self,
            token_rewards=on_last_token(rewards, self.response_mask),
            function_rewards=rewards[:, None].expand_as(self.function_rewards).clone(),
        )


def on_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """(N,) -> (N, T): an outcome reward sits on the last response token."""
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    return torch.zeros(mask.shape).index_put((torch.arange(len(mask)), last), rewards.to(torch.float32))


def make_batch(sizes: Sequence[int], *, seed: int, functions: int, tokens: int = 7, dense: bool = False) -> Batch:
    """Random rewards for groups of these sizes, interleaved; lengths differ, and some tokens inside are not the policy's.

    dense: a reward on every response token instead of one on the last.
    """
    make = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=make)]
    n = len(groups)
    lengths = torch.randint(1, tokens + 1, (n,), generator=make)
    mask = torch.arange(tokens) < lengths[:, None]
    mask[:, 1:-1] &= torch.rand((n, tokens - 2), generator=make) > 0.2  # e.g. the output of a tool
    mask[:, 0] = True
    parts = torch.randint(-4, 5, (n, functions), generator=make) / 2 + torch.rand((n, functions), generator=make)
    rewards = on_last_token(parts.sum(1), mask)
    if dense:
        rewards = torch.randn((n, tokens), generator=make) * mask
    greedy = torch.rand(len(sizes), generator=make)[groups]
    return Batch(rewards, mask, groups, greedy, parts)


@dataclass(frozen=True)
class Subject:
    """A built estimator with its declared needs."""

    label: str
    estimator: Any
    needs: Mapping[str, bool | int]
    functions: int
    """K, the number of reward functions it is tried with."""

    @property
    def smallest(self) -> int:
        """The fewest members a group may have."""
        return int(self.needs["min_group_size"])

    def batch(self, *, dense: bool = False, seed: int = 0) -> Batch:
        """Uneven groups, none smaller than the estimator allows and none of one."""
        low = max(2, self.smallest)
        sizes = (low, low + 5, low + 1, low, low + 2)
        return make_batch(sizes, seed=seed, functions=self.functions, dense=dense)

    def call(self, batch: Batch, all_reduce: AllReduce | None = None) -> tuple[Tensor, Tensor]:
        """(advantages, returns) from the very tensors of `batch`, with what the estimator declared to need."""
        needs: dict[str, Any] = {}
        if self.needs["greedy_baseline"]:
            needs["greedy_rewards"] = batch.greedy_rewards
        if self.needs["whole_batch"]:
            needs["all_reduce"] = all_reduce or _alone
        if self.needs["per_function_rewards"]:
            needs["function_rewards"] = batch.function_rewards
        out = self.estimator(batch.token_rewards, batch.response_mask, batch.group_index, **needs)
        if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(value, Tensor) for value in out)):
            raise AssertionError(f"it returned {type(out).__name__}, not the two tensors (advantages, returns)")
        return out

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(advantages, returns) from a copy of `batch`."""
        return self.call(batch.clone())

    def run_on_ranks(self, batch: Batch, ranks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(advantages, returns) of `batch` when rank k holds the sequences ranks[k]; the ranks are threads."""
        sums = _Sums(len(ranks))
        parts = [batch.rows(index) for index in ranks]
        with ThreadPoolExecutor(len(ranks)) as pool:
            futures = [pool.submit(sums.rank(k, self.call), part) for k, part in enumerate(parts)]
            failures = [future.exception() for future in futures]
        own = [error for error in failures if error and not isinstance(error, threading.BrokenBarrierError)]
        if any(failures):
            raise own[0] if own else AssertionError(f"a rank waited {_RANK_DEADLINE_S:.0f} s in all_reduce for another")
        order = torch.cat(list(ranks)).argsort()
        results = [future.result() for future in futures]
        return torch.cat([a for a, _ in results])[order], torch.cat([r for _, r in results])[order]


def build_subject(name: str, options: Mapping[str, Any], functions: int = 2) -> Subject:
    """The estimator `name` with these options; RecipeError says what is wrong with it."""
    estimator = REGISTRY.build(name, options)
    return Subject(REGISTRY.label(name), estimator, REGISTRY.needs(estimator), functions)


def _alone(tensor: Tensor) -> Tensor:
    return tensor


class _Sums:
    """An all-reduce between threads, one a rank. Ranks that do not call it equally often get an error, not a hang."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=_RANK_DEADLINE_S)
        self._given: list[Tensor | None] = [None] * world

    def rank(self, k: int, call: Any) -> Any:
        """`call(batch, all_reduce)` as rank k."""

        def all_reduce(tensor: Tensor) -> Tensor:
            given = self._meet(k, tensor)
            there = [value for value in given if value is not None]
            if len(there) < len(given):
                raise _uneven()
            return torch.stack(there).sum(0)

        def run(batch: Batch) -> Any:
            try:
                out = call(batch, all_reduce)
                if any(value is not None for value in self._meet(k, None)):
                    raise _uneven()
            except BaseException:
                self._barrier.abort()
                raise
            return out

        return run

    def _meet(self, k: int, value: Tensor | None) -> list[Tensor | None]:
        """What every rank brings; None: it has finished."""
        self._given[k] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given


def _uneven() -> AssertionError:
    return AssertionError("the ranks do not call all_reduce equally often: a real run would hang")
