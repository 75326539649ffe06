"""The samples of one `RewardPool.score` call, as keyword arguments of the reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_ds.config import RecipeError


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """N samples."""

    keywords: dict[str, list[Any]]
    """Arguments of the functions, each a list of N."""
    rows: list[int]
    """Row of the data file of each sample, for messages."""

    @staticmethod
    def make(
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        rows: Sequence[int] | None,
    ) -> RewardBatch:
        """See `RewardPool.score`."""
        answers = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        own = {"prompts": list(prompts), "completions": answers, "completion_ids": [list(i) for i in completion_ids]}
        if own.keys() & columns.keys():
            clash = min(own.keys() & columns.keys())
            raise RecipeError(f"data column {clash!r} has the name of a reward keyword; rename it with data.columns")
        keywords = own | {name: list(column) for name, column in columns.items()}
        if any(len(value) != len(prompts) for value in keywords.values()):
            lengths = {name: len(value) for name, value in keywords.items()}
            raise ValueError(f"the arguments of score differ in length: {lengths}")
        return RewardBatch(keywords, list(range(len(prompts)) if rows is None else rows))

    def part(self, samples: Sequence[int]) -> dict[str, list[Any]]:
        """The arguments for these samples."""
        return {name: [value[sample] for sample in samples] for name, value in self.keywords.items()}

    def describe(self, sample: int) -> str:
        """How messages name a sample."""
        completion = self.keywords["completions"][sample]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        return f"prompt row {self.rows[sample]}, completion {text[:80]!r}"
