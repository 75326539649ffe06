"""An estimator and a reward of one's own. `pip install` this folder, then write `adv_estimator: midpoint` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Midpoint:
    """A_i = scale * (R_i - (min + max of the group) / 2)."""

    scale: float = 1.0
    """Factor on every advantage."""

    min_group_size: ClassVar[int] = 2

    def __call__(
        self, token_rewards: Tensor, response_mask: Tensor, group_index: Tensor, greedy_rewards: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        from grpo_ds.estimators.base import check_batch  # here, so that reward processes read this file without torch

        batch = check_batch(token_rewards, response_mask, group_index, min_group_size=self.min_group_size)
        totals, groups = batch.totals, batch.groups
        middle = (groups.min(totals) + groups.max(totals)) / 2
        return batch.spread(self.scale * (totals - middle[groups.index])), batch.spread(totals)


def digits_right(completions: list[str], answer: list[Any], **columns: Any) -> list[float]:
    """The share of the answer's digits that stand where they belong."""
    pairs = zip((text.strip() for text in completions), map(str, answer), strict=True)
    return [
        sum(a == b for a, b in zip(text, truth, strict=False)) / max(len(text), len(truth)) for text, truth in pairs
    ]
