"""What is minimised on one micro-batch, composed from losses/: policy loss x importance weight + KL, reduced once. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ds.batching import MicroBatch
from grpo_ds.config import ActorConfig, ImportanceConfig
from grpo_ds.losses import (
    REGISTRY,
    Totals,
    aggregate,
    importance_weights,
    kl_estimate,
    mismatch_stats,
    rejection_mask,
)

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
        result = self.policy_loss(logprobs, old, micro.advantages, micro.sequence_index)
        token_loss, policy_stats = self._checked(result, logprobs, old, micro.advantages)
        weights = self._weights(old, micro)
        token_loss = token_loss * weights
        stats: Stats = {f"policy/{name}": value.detach().double().reshape(()) for name, value in policy_stats.items()}
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
            f"mismatch/{name}": value
            for name, value in mismatch_stats(
                old, micro.rollout_logprobs, weights, micro.sequence_index, self.importance.level
            ).items()
        }
        return share, {name: value.cpu() for name, value in stats.items()}

    def _weights(self, old: Tensor, micro: MicroBatch) -> Tensor:
        """(M,) importance weights; 0 where the rejection mask says so."""
        how, index = self.importance, micro.sequence_index
        weights = importance_weights(old, micro.rollout_logprobs, index, how.level, how.mode, how.lower, how.upper)
        if how.reject == "off":
            return weights
        return weights * rejection_mask(
            old, micro.rollout_logprobs, index, how.reject, how.reject_lower, how.reject_upper
        )

    def _checked(self, result: object, logprobs: Tensor, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss' result; ValueError naming the plugin unless it has one loss a token.

        A loss that is reduced already would be spread over all tokens by the weights, unnoticed.
        """
        fault = _fault(result, logprobs, inputs)
        if fault:
            raise ValueError(
                f"actor.policy_loss_fn: {REGISTRY.label(self.actor.policy_loss_fn)} returned {fault}: it must return "
                f"(token_loss, stats) with one finite loss for each of the {logprobs.numel()} tokens, not yet reduced, and "
                "one number a statistic"
            )
        return result  # type: ignore[return-value]


def _fault(result: object, logprobs: Tensor, inputs: tuple[Tensor, ...]) -> str | None:
    """What is wrong with the result of a policy loss, if anything."""
    if not isinstance(result, tuple) or len(result) != 2:
        return f"a {type(result).__name__}{f' of {len(result)}' if isinstance(result, tuple | list) else ''}"
    loss, stats = result
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        return f"a loss of type {loss.dtype if isinstance(loss, Tensor) else type(loss).__name__}"
    if loss.shape != logprobs.shape:
        return f"a loss of shape {tuple(loss.shape)}"
    if logprobs.requires_grad and not loss.requires_grad:
        return "a loss without a gradient"
    if not isinstance(stats, dict) or not all(isinstance(value, Tensor) for value in stats.values()):
        return "stats that are no dict of tensors"
    for name, value in stats.items():
        if value.numel() != 1:
            return f"the statistic {name!r} of shape {tuple(value.shape)}"
    if not loss.isfinite().all() and all(given.isfinite().all() for given in (logprobs, *inputs)):
        return f"the loss {loss.detach()[~loss.isfinite()][0].item()} for finite log-probabilities and advantages"
    return None


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
