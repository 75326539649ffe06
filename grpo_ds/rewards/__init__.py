"""Rewards: a response becomes a score, or the statement that it cannot be scored.

The contract of a reward function (TRL's):

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

* It is called with keyword arguments only; a function without `**kwargs` receives just the keywords it names.
* `prompts`, `completions`, `completion_ids` and each data column are lists of equal length, one entry a sample.
* `completions` holds strings, or `[{"role": "assistant", "content": text}]` where the prompt is a list of messages.
* `None` in the result means "cannot be scored". NaN and infinity are refused.
* The value of a sample must not depend on the other samples of the call: calls carry any number of samples, and a
  call that fails is repeated sample by sample.

Nothing in this package imports torch, so the processes that run rewards start fast and stay small.
"""

from grpo_ds.rewards.combine import make_group, weighted_score
from grpo_ds.rewards.overlong import soft_overlong_penalty
from grpo_ds.rewards.pool import FunctionStats, RewardError, RewardPool
from grpo_ds.rewards.resolve import function_names

__all__ = [
    "FunctionStats",
    "RewardError",
    "RewardPool",
    "function_names",
    "make_group",
    "soft_overlong_penalty",
    "weighted_score",
]
