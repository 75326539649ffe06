"""The recipe's section `algorithm`: estimator, dynamic sampling, mismatch correction. No torch here; see `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_ds.errors import require


@dataclass(frozen=True, kw_only=True)
class FilterGroupsConfig:
    enable: bool = True
    """DAPO's dynamic sampling: only groups whose scores differ are trained on."""
    filter: str = "dynamic_sampling"
    """Which groups are kept: a name of entry-point group `grpo_ds.filters`."""
    filter_args: dict[str, Any] = field(default_factory=dict)
    """The filter's own options, beside `tolerance`."""
    metric_to_filter: str = "score"
    """What must differ within a group: `score` (unshaped), or the name of one reward function."""
    tolerance: float = 0.0
    """A group is kept iff max > min + tolerance, in units of the metric."""
    max_num_gen_batches: int = 4
    """Generation batches a round may use to find its groups; 0: no limit."""
    max_staleness: int = 1
    """Tokens of a policy more than this many versions old give no loss, and a group with no other tokens, such as a
    surplus group that waited too long, is dropped; 0: only what the current policy sampled is trained on."""
    on_exhausted: Literal["error", "train_partial"] = "error"
    """When max_num_gen_batches did not give enough groups: end the run, or train on what there is."""

    def __post_init__(self) -> None:
        require(self.max_num_gen_batches >= 0, "algorithm.filter_groups.max_num_gen_batches must not be negative")
        require(self.max_staleness >= 0, "algorithm.filter_groups.max_staleness must not be negative")
        require(self.tolerance >= 0, "algorithm.filter_groups.tolerance must not be negative")


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    level: Literal["off", "token", "sequence"] = "token"
    """Importance weight between engine and trainer log-probabilities: one a token, one a sequence, or none."""
    mode: Literal["truncate", "mask"] = "truncate"
    """truncate: min(w, upper). mask: w inside [lower, upper], 0 outside."""
    upper: float = 2.0
    """Upper bound C of the weight."""
    lower: float = 0.5
    """Lower bound of the weight in mode mask."""
    reject: Literal["off", "token", "sequence", "geometric"] = "off"
    """Rejection mask beside the weight: tokens whose own exp(log-ratio), or that of their sequence (its product, or its
    geometric mean over the tokens), lies outside [reject_lower, reject_upper] give no loss; they count in the mean."""
    reject_lower: float = 0.5
    """Smallest ratio that is not rejected."""
    reject_upper: float = 2.0
    """Largest ratio that is not rejected."""

    def __post_init__(self) -> None:
        for low, high in (("lower", "upper"), ("reject_lower", "reject_upper")):
            bounds = getattr(self, low), getattr(self, high)
            require(
                0 <= bounds[0] <= bounds[1] and bounds[1] > 0,
                f"algorithm.importance.{low} is {bounds[0]} and algorithm.importance.{high} is {bounds[1]}: "
                f"give 0 <= {low} <= {high}, and {high} above 0",
            )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    adv_estimator: str = "grpo"
    """Advantage estimator: a name of entry-point group `grpo_ds.estimators`."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation, for estimators that know the option (false: Dr.GRPO)."""
    gamma: float = 1.0
    """Discount of later rewards, for estimators that know the option."""
    estimator_args: dict[str, Any] = field(default_factory=dict)
    """The estimator's own options."""
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    """Dynamic sampling."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """Correction of the train/inference mismatch."""
    mask_truncated_responses: bool = False
    """DAPO's overlong filtering: responses cut off at max_response_tokens give no loss."""
