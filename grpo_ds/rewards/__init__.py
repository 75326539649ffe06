"""Rewards: a response becomes a score, or the statement that it cannot be scored.

The contract of a reward function (TRL's):

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

* It is called with keyword arguments only; a function without `**kwargs` receives just the keywords it names.
* `prompts`, `completions`, `completion_ids` and each data column are lists of equal length, one entry a sample.
* `completions` holds strings, or `[{"role": "assistant", "content": text}]` where the prompt is a list of messages.
* `None` in the result means "does not apply to this response": its score is the weighted sum of the other functions. A
  response without any value of a function with a weight cannot be scored. NaN and infinity are refused.
* A response on which a function fails (raises, misses its deadline) ends the run, or cannot be scored either, whatever the
  other functions say (`reward.on_error`). What cannot be scored is counted, and left out of group, filter and loss.
* A call holds the responses of one prompt, all `rollout.n` of them in order (one response in an evaluation with
  `train.heldout_n: 1`, and where an estimator asks for a greedy response), so a value may depend on its group.
* Where a call fails, its samples are tried one by one to find the guilty ones. The others are called once more, together.
* A class has options, its typed fields, which `reward.function_args` sets; its instances are called.

Nothing in this package imports torch, so the processes that run rewards start fast and stay small.
"""

from grpo_ds.rewards.combine import make_group, weighted_score
from grpo_ds.rewards.overlong import soft_overlong_penalty
from grpo_ds.rewards.pool import RewardPool
from grpo_ds.rewards.resolve import function_names
from grpo_ds.rewards.scoring import FunctionStats, RewardError

__all__ = [
    "FunctionStats",
    "RewardError",
    "RewardPool",
    "function_names",
    "make_group",
    "soft_overlong_penalty",
    "weighted_score",
]
