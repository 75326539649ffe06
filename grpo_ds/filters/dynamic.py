"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): a group whose scores are equal teaches nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_ds.filters.base import Decision, register


def keep_group(scores: Sequence[float | None], tolerance: float = 0.0) -> Decision:
    """Keep a group iff max > min + tolerance over its scored members. Scores are the UNSHAPED ones.

    Reasons: `kept`; `all_right` (no difference, every score above 0); `all_wrong` (no difference otherwise);
    `unscorable` (fewer than two members have a score). The test is on max and min, never on a standard deviation:
    in floating point that of equal numbers need not be 0. ValueError for a score that is not finite.

    >>> keep_group([1.0, 0.0, None]).reason, keep_group([1.0, 1.0, None]).reason, keep_group([0.0, 0.0]).reason
    ('kept', 'all_right', 'all_wrong')
    >>> keep_group([1.0, None])
    Decision(keep=False, reason='unscorable')
    """
    for member, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            raise ValueError(f"score {score} of member {member} is not finite: a reward must be a number or None")
    known = [score for score in scores if score is not None]
    if len(known) < 2:
        return Decision(False, "unscorable")
    low, high = min(known), max(known)
    if high > low + tolerance:
        return Decision(True, "kept")
    return Decision(False, "all_right" if low > 0 else "all_wrong")


@register("dynamic_sampling")
@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """Keeps a group iff its scores differ: max > min + tolerance.  arXiv 2503.14476

    >>> DynamicSampling(tolerance=0.5)([0.0, 0.5])
    Decision(keep=False, reason='all_wrong')
    """

    tolerance: float = 0.0
    """Differences up to this count as none, in units of the score."""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance is {self.tolerance}, it must not be negative")

    def __call__(self, scores: Sequence[float | None]) -> Decision:
        return keep_group(scores, self.tolerance)
