"""What is minimised on one micro-batch, composed from losses/: policy loss x importance weight + KL, reduced once. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ds.batching import MicroBatch
from grpo_ds.config import ActorConfig, ImportanceConfig
from grpo_ds.losses import Totals, aggregate, importance_weights, kl_estimate, mismatch_stats

Stats = dict[str, Tensor]
"""Mergeable over micro-batches and ranks: names ending in `_max` by maximum, all others by addition. float64."""


@dataclass(frozen=True)
class Objective:
    """The loss of the recipe, as one call a micro-batch."""

    policy_loss: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    actor: ActorConfig
    importance: ImportanceConfig

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        micro: MicroBatch,
        totals: Totals,
        *,
        version: int,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        kl_coef: float,
    ) -> tuple[Tensor, Stats]:
        """This micro-batch's share of the step's loss (scalar, with gradient), and mergeable statistics.

        logprobs, entropy: (M,) under the policy being trained. old_logprobs: (M,) at the start of the round, or None
        when the round is one optimizer step, where they equal `logprobs` without gradient. ref_logprobs: (M,), or None
        without a reference; kl_coef: weight of the KL where it is placed in the loss. version: the policy version of
        the engine, for the freshness statistics.
        """
        old = logprobs.detach() if old_logprobs is None else old_logprobs
        token_loss, policy_stats = self.policy_loss(logprobs, old, micro.advantages, micro.sequence_index)
        imp = self.importance
        weights = importance_weights(
            old, micro.rollout_logprobs, micro.sequence_index, imp.level, imp.mode, imp.lower, imp.upper
        )
        token_loss = token_loss * weights
        stats: Stats = {f"policy/{name}": value.detach().double() for name, value in policy_stats.items()}
        if ref_logprobs is not None:
            kl = kl_estimate(self.actor.kl_loss_type, logprobs, ref_logprobs)
            if self.actor.kl_placement == "loss":
                token_loss = token_loss + kl_coef * kl
            stats["kl_sum"] = kl.detach().double().sum()
        share = aggregate(token_loss, micro.sequence_index, self.actor.loss_agg_mode, totals)
        fresh = micro.versions == version
        stats["fresh_tokens"] = fresh.double().sum()
        stats["fresh_gap_sum"] = (old - micro.rollout_logprobs).abs().double()[fresh].sum()
        stats["stale_tokens"] = (~fresh).double().sum()
        stats["entropy_sum"] = entropy.detach().double().sum()
        stats["loss"] = share.detach().double()
        stats |= {
            f"mismatch/{name}": value for name, value in mismatch_stats(old, micro.rollout_logprobs, weights).items()
        }
        return share, {name: value.cpu() for name, value in stats.items()}


def merge(first: Stats, second: Stats) -> Stats:
    """The statistics of both micro-batches together; a name that only one has is taken as it is."""
    merged = dict(first)
    for name, value in second.items():
        if name not in merged:
            merged[name] = value
        elif name.endswith("_max"):
            merged[name] = torch.maximum(merged[name], value)
        else:
            merged[name] = merged[name] + value
    return merged
