"""From each function's values to a `Group`: the weighted score and the shaped reward. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from grpo_ds.config import RewardConfig
from grpo_ds.rewards.overlong import soft_overlong_penalty
from grpo_ds.types import Group, Prompt, Rollout, Scored


def weighted_score(parts: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Sum of weight * value over the functions that gave a value; None when none did (TRL's nansum semantics).

    A function of weight 0 is only measured: where it alone has a value, nothing is known of the response.

    >>> weighted_score([1.0, None, 0.5], [1.0, 1.0, 2.0])
    2.0
    >>> weighted_score([None, 37.0], [1.0, 0.0])
    """
    known = [w * value for value, w in zip(parts, weights, strict=True) if value is not None and w != 0]
    return float(sum(known)) if known else None


def make_group(
    prompt: Prompt,
    rollouts: Sequence[Rollout],
    parts: Sequence[Mapping[str, float | None]],
    config: RewardConfig,
    max_response_tokens: int,
    failed: Collection[int] = (),
) -> Group:
    """The scored rollouts of one prompt.

    `parts` has one mapping a rollout, {function name: value}, in the order of `config.functions`. The score is their
    weighted sum; the reward is the score plus the soft overlong penalty on the number of response tokens. `failed`:
    positions of rollouts on which a function failed. They have no score: the sum of the other functions would compare a
    right answer whose check crashed with wrong ones.
    """
    weights = config.weights or [1.0] * len(config.functions)
    members = []
    for k, (rollout, values) in enumerate(zip(rollouts, parts, strict=True)):
        score = None if k in failed else weighted_score(list(values.values()), weights)
        penalty = soft_overlong_penalty(
            len(rollout.token_ids), max_response_tokens, config.overlong_buffer_len, config.overlong_penalty_factor
        )
        reward = None if score is None else score + penalty
        members.append(Scored(rollout, score, reward, dict(values), failed=k in failed))
    return Group(prompt=prompt, members=tuple(members))
