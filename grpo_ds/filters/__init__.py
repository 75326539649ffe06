"""Group filters (entry-point group `grpo_ds.filters`).

A filter is a class whose fields are its options and whose `__call__` is `(scores) -> Decision` for the scores of one
group, None for a member that cannot be scored. It gives a reason with each decision, so that every drop is counted.
"""

from grpo_ds.filters import dynamic as _dynamic
from grpo_ds.filters.base import REGISTRY, Decision, get_filter, register
from grpo_ds.filters.dynamic import DynamicSampling, keep_group

__all__ = [
    "REGISTRY",
    "Decision",
    "DynamicSampling",
    "get_filter",
    "keep_group",
    "register",
]
del _dynamic
