"""Losses: token losses of the policy, KL to the reference, mismatch weights, and the one reduction. See `base`."""

from grpo_ds.losses import policy as _policy
from grpo_ds.losses.aggregate import MODES, Totals, aggregate
from grpo_ds.losses.base import REGISTRY, get_policy_loss, register
from grpo_ds.losses.kl import check_kl_name, kl_estimate
from grpo_ds.losses.kl_control import KlController
from grpo_ds.losses.mismatch import (
    importance_weights,
    mismatch_stats,
    rejection_mask,
    summarise_mismatch,
)

__all__ = [
    "MODES",
    "REGISTRY",
    "KlController",
    "Totals",
    "aggregate",
    "check_kl_name",
    "get_policy_loss",
    "importance_weights",
    "kl_estimate",
    "mismatch_stats",
    "register",
    "rejection_mask",
    "summarise_mismatch",
]
del _policy
