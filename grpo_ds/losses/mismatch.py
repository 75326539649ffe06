"""The mismatch between the engine that sampled and the trainer that learns: weights against it, and its size.

Both run the same policy, in other kernels: lr = old_logprobs - rollout_logprobs is small, but not 0. A token's weight is
w = exp(lr). Truncation (TIS) and masking (IcePop) bound it; a rejection mask leaves out what is too far off, beside any
weight. A token that a mask leaves out gives no loss and stays in the denominator: which ones these are is known only in
the forward pass, when the denominator of the step is agreed already.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_ds.config import RecipeError
from grpo_ds.losses.base import LOG_RATIO_LIMIT, sequence_means, sequence_sums

_LEVELS = ("off", "token", "sequence")
_MODES = ("truncate", "mask")
_REJECTS = ("token", "sequence", "geometric")
_BINS_PER_DECADE, _DECADES = 50, 8
"""The histogram spans differences of 1e-8 to 1; a bin is 4.7 percent wide, which is the error of the percentile."""
_BINS = _BINS_PER_DECADE * _DECADES


def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    sequence_index: Tensor,
    level: str,
    mode: str,
    lower: float,
    upper: float,
) -> Tensor:
    """Weights (M,), detached, to multiply the token losses with.

    Args: all tensors (M,). level: `token` w = exp(lr), `sequence` w = exp(sum of lr over the sequence), `off` w = 1. lr
    and its sum are clamped to +-20. mode: `truncate` min(w, upper), `mask` w inside [lower, upper] and 0 outside.

    >>> old, roll, index = torch.tensor([3.0, 0.5, 1.0]).log(), torch.zeros(3), torch.tensor([0, 0, 1])
    >>> [round(w, 4) for w in importance_weights(old, roll, index, "token", "truncate", 0.5, 2.0).tolist()]
    [2.0, 0.5, 1.0]
    >>> [round(w, 4) for w in importance_weights(old, roll, index, "sequence", "mask", 0.5, 2.0).tolist()]
    [1.5, 1.5, 1.0]
    """
    if level not in _LEVELS or mode not in _MODES:
        raise RecipeError(
            f"importance level {level!r} must be one of {', '.join(_LEVELS)} and mode {mode!r} one of {', '.join(_MODES)}"
        )
    if level == "off":
        return torch.ones_like(old_logprobs.detach())
    log_weight = _log_weights(old_logprobs, rollout_logprobs)
    if level == "sequence":
        log_weight = sequence_sums(log_weight, sequence_index).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    weights = log_weight.exp()
    if mode == "truncate":
        return weights.clamp(max=upper)
    return torch.where((weights >= lower) & (weights <= upper), weights, 0.0)


def rejection_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, sequence_index: Tensor, level: str, lower: float, upper: float
) -> Tensor:
    """(M,) float32, detached: 1 where lower <= ratio <= upper, else 0.

    Args: all tensors (M,). The ratio is exp(lr) of the token (`token`), or that of its whole sequence: the product
    (`sequence`), or the geometric mean over its tokens (`geometric`), which does not depend on the length.

    >>> old, roll, index = torch.tensor([3.0, 0.5, 1.0]).log(), torch.zeros(3), torch.tensor([0, 0, 1])
    >>> [rejection_mask(old, roll, index, level, 0.5, 2.0).tolist() for level in ("token", "sequence")]
    [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if level not in _REJECTS:
        raise RecipeError(f"importance.reject {level!r} must be off or one of {', '.join(_REJECTS)}")
    log_ratio = _log_weights(old_logprobs, rollout_logprobs)
    if level == "sequence":
        log_ratio = sequence_sums(log_ratio, sequence_index).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    elif level == "geometric":
        log_ratio = sequence_means(log_ratio, sequence_index)
    ratio = log_ratio.exp()
    return ((ratio >= lower) & (ratio <= upper)).to(torch.float32)


def mismatch_stats(
    old_logprobs: Tensor, rollout_logprobs: Tensor, weights: Tensor, sequence_index: Tensor, level: str
) -> dict[str, Tensor]:
    """Mergeable statistics of one micro-batch, float64: merge entries named `*_max` by maximum, all others by addition.

    Args: all tensors (M,), `weights` the applied ones. level: that of the weights; at `sequence` the unbounded weights,
    from which chi2 and the effective sample size come, are those of whole sequences, one each. Merged over
    micro-batches and ranks they go to `summarise_mismatch`.
    """
    log_weight = _log_weights(old_logprobs, rollout_logprobs).to(torch.float64)
    raw = log_weight.exp()
    own = _sequence_weights(log_weight, sequence_index) if level == "sequence" else raw
    gap = (old_logprobs.detach().to(torch.float64).exp() - rollout_logprobs.detach().to(torch.float64).exp()).abs()
    applied = weights.detach().to(torch.float64)
    nothing = gap.new_zeros(1)  # the maximum of no tokens is 0
    # The index of the bin counts from the small end; differences below its range fall into bin 0. NaN counts as the
    # largest: it shows in the other sums, and the loop stops at the gradient's norm with a sentence.
    bins = (
        (gap.nan_to_num(nan=1.0).clamp(min=1e-300).log10() * _BINS_PER_DECADE + _BINS)
        .floor()
        .clamp(0, _BINS - 1)
        .to(torch.int64)
    )
    return {
        "tokens": torch.ones_like(gap).sum(),
        "gap_sum": gap.sum(),
        "gap_max": torch.cat([gap, nothing]).max(),
        "gap_histogram": torch.bincount(bins, minlength=_BINS).to(torch.float64),
        "outside_sum": ((raw < 0.9) | (raw > 1.1)).to(torch.float64).sum(),
        "kl_sum": (raw - 1 - log_weight).sum(),
        "raw_count": torch.ones_like(own).sum(),
        "raw_sum": own.sum(),
        "raw_square_sum": own.square().sum(),
        "weight_sum": applied.sum(),
        "weight_zero_sum": (applied == 0).to(torch.float64).sum(),
    }


def _sequence_weights(log_weight: Tensor, sequence_index: Tensor) -> Tensor:
    """(M,) float64 -> one unbounded weight a sequence."""
    _, inverse = torch.unique_consecutive(sequence_index, return_inverse=True)
    count = int(inverse.max()) + 1 if inverse.numel() else 0
    sums = log_weight.new_zeros(count).index_add(0, inverse, log_weight)
    return sums.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def summarise_mismatch(merged: dict[str, Tensor]) -> dict[str, float]:
    """The numbers to log; empty where there was no token. p_old, p_roll are probabilities of the sampled token.

    prob_gap_mean, prob_gap_max, prob_gap_p99: of |p_old - p_roll| (p99 to 5 percent, from above); weight_outside: share
    of tokens with exp(lr) outside [0.9, 1.1]; kl: k3 estimate of KL(engine || trainer); chi2: E[w^2] - 1 over tokens, or
    over sequences where the weights are theirs; ess: effective sample size (sum w)^2 / sum w^2 over their number, in
    (0, 1]; weight_mean, weight_zero: mean and share of zeros of the applied weights, over tokens.
    """
    tokens = merged["tokens"].item()
    if tokens == 0:
        return {}
    value = {name: entry.item() for name, entry in merged.items() if entry.dim() == 0}
    reached = merged["gap_histogram"].cpu().cumsum(0) >= math.ceil(0.99 * tokens)
    upper_edge = 10.0 ** ((int(reached.to(torch.int64).argmax()) + 1 - _BINS) / _BINS_PER_DECADE)
    return {
        "prob_gap_mean": value["gap_sum"] / tokens,
        "prob_gap_max": value["gap_max"],
        "prob_gap_p99": min(upper_edge, value["gap_max"]),
        "weight_outside": value["outside_sum"] / tokens,
        "kl": value["kl_sum"] / tokens,
        "chi2": value["raw_square_sum"] / value["raw_count"] - 1,
        "ess": value["raw_sum"] ** 2 / (value["raw_square_sum"] * value["raw_count"]),
        "weight_mean": value["weight_sum"] / tokens,
        "weight_zero": value["weight_zero_sum"] / tokens,
    }


def _log_weights(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    return (old_logprobs.detach() - rollout_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
