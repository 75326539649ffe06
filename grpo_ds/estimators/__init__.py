"""Advantage estimators: rewards of one batch -> advantages. The contract is in `base`."""

from grpo_ds.estimators import group as _group
from grpo_ds.estimators import reinforce as _reinforce
from grpo_ds.estimators.base import REGISTRY, estimator_options, get_estimator, register
from grpo_ds.estimators.stats import AllReduce

__all__ = ["REGISTRY", "AllReduce", "estimator_options", "get_estimator", "register"]
del _group, _reinforce
