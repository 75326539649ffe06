"""Scored groups -> samples with advantages, and their wire form. Pure.

Every per-token array of a sample has the length of its token_ids (prompt + response). Tokens that may not be trained
on (of a truncated response, of a policy too old) are masked here, after the estimator: the whole response was sampled
and earned its reward, so it counts in the statistics of its group and of the batch; all that comes later, denominators
included, sees the tokens that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from grpo_ds.types import Group, Sample, Scored

Estimator = Callable[..., tuple[Tensor, Tensor]]

LEFT_OUT = ("no_tokens", "unscored", "unscored_part", "no_baseline", "small_group")
"""Why a member of a kept group is not trained on: nothing was generated; no reward; no value of one of the functions
that the estimator looks at; no reward of the greedy response; fewer members left than the estimator needs."""


@dataclass(frozen=True)
class AdvantageStage:
    """Groups -> samples with advantages, giving the estimator what it declared to need."""

    estimator: Estimator
    mask_truncated: bool = False
    """Responses that were cut off give no loss (DAPO's overlong filtering); they count in their group's statistics."""
    min_group_size: int = 1
    """Groups with fewer members that have a reward are left out."""
    greedy_baseline: bool = False
    """Pass the reward of each group's greedy response (ReMax)."""
    functions: tuple[str, ...] | None = None
    """Names of the reward functions whose values are passed one by one (GDPO); None: not passed."""
    all_reduce: Callable[[Tensor], Tensor] | None = None
    """Sum over ranks, for estimators that look at the whole batch; every rank must then call, also without groups."""
    label: str = "the estimator"
    """How messages name it."""

    def trainable(self, group: Group) -> list[Scored]:
        """The members with a token, a reward and what the estimator needs; others stay out of statistics and loss."""
        return [m for m, reason in zip(group.members, self._reasons(group), strict=True) if reason is None]

    def left_out(self, groups: Sequence[Group]) -> dict[str, int]:
        """How many members are not trainable, for each reason of LEFT_OUT."""
        counts = Counter(reason for group in groups for reason in self._reasons(group))
        return {reason: counts[reason] for reason in LEFT_OUT}

    def _reasons(self, group: Group) -> list[str | None]:
        """For each member why it is left out, or None."""
        reasons = [self._reason(group, member) for member in group.members]
        if reasons.count(None) < self.min_group_size:
            return [reason or "small_group" for reason in reasons]
        return reasons

    def _reason(self, group: Group, member: Scored) -> str | None:
        if self.greedy_baseline and (group.baseline is None or group.baseline.reward is None):
            return "no_baseline"
        if not member.rollout.token_ids:  # an engine that was told to abort had not begun it
            return "no_tokens"
        if member.reward is None:
            return "unscored"
        return "unscored_part" if any(member.parts[f] is None for f in self.functions or ()) else None

    def drafts(self, groups: Sequence[Group]) -> list[Sample]:
        """The samples without advantages, in the order of `__call__`; nothing is masked."""
        return [_sample(g, m, torch.zeros(len(m.rollout.token_ids))) for g in groups for m in self.trainable(g)]

    def __call__(
        self, groups: Sequence[Group], penalties: Sequence[Tensor] | None = None, oldest: int = 0
    ) -> list[Sample]:
        """Runs the estimator over whole groups; samples come in group order.

        penalties: for each sample an (R,) tensor taken off its token rewards (KL placed in the reward). oldest: tokens
        of earlier policy versions give no loss.
        """
        members = [(i, group, member) for i, group in enumerate(groups) for member in self.trainable(group)]
        if not members and self.all_reduce is None:
            return []
        rewards, mask = token_rewards([m for _, _, m in members])
        for row, penalty in zip(rewards, penalties or (), strict=penalties is not None):
            row[: penalty.numel()] -= penalty
        index = torch.tensor([i for i, _, _ in members], dtype=torch.int64)
        result = self.estimator(rewards, mask, index, **self._needs([(g, m) for _, g, m in members]))
        advantages = self._checked(result, mask)
        samples = [_sample(group, member, row) for (_, group, member), row in zip(members, advantages, strict=True)]
        for (_, _, member), sample in zip(members, samples, strict=True):
            if self.mask_truncated and member.rollout.finish_reason == "length":
                sample.response_mask.zero_()
            sample.response_mask.logical_and_(sample.versions >= oldest)
        return samples

    def _checked(self, result: object, mask: Tensor) -> Tensor:
        """The advantages of an estimator's result; ValueError naming the plugin unless there is one for every token."""
        advantages = result[0] if isinstance(result, tuple) and len(result) == 2 else None
        fault = None
        if not isinstance(advantages, Tensor):
            fault = f"a {type(result).__name__}"
        elif advantages.shape != mask.shape or not advantages.is_floating_point():
            fault = f"advantages of shape {tuple(advantages.shape)} and type {advantages.dtype}"
        elif not (finite := advantages.isfinite().all(1)).all():
            fault = f"an advantage of sample {int(finite.logical_not().nonzero()[0])} that is not finite"
        elif (outside := advantages[~mask].count_nonzero()) > 0:
            fault = f"advantages other than 0 on {int(outside)} tokens outside the mask"
        if advantages is None or fault:
            raise ValueError(
                f"algorithm.adv_estimator: {self.label} returned {fault}: it must return (advantages, returns), both float "
                f"of shape {tuple(mask.shape)}, finite, and 0 where the mask is 0"
            )
        return advantages.to(torch.float32)

    def _needs(self, members: Sequence[tuple[Group, Scored]]) -> dict[str, Any]:
        needs: dict[str, Any] = {}
        if self.greedy_baseline:
            needs["greedy_rewards"] = torch.tensor([float(g.baseline.reward) for g, _ in members])  # type: ignore[union-attr,arg-type]
        if self.functions is not None:
            rows = [[float(m.parts[f]) for f in self.functions] for _, m in members]  # type: ignore[arg-type]
            needs["function_rewards"] = torch.tensor(rows).reshape(len(members), len(self.functions))
        if self.all_reduce is not None:
            needs["all_reduce"] = self.all_reduce
        return needs


def token_rewards(members: Sequence[Scored]) -> tuple[Tensor, Tensor]:
    """(N, R) float32 rewards with each outcome on the last response token, and the (N, R) response mask."""
    lengths = torch.tensor([len(m.rollout.token_ids) for m in members], dtype=torch.int64)
    mask = torch.arange(int(lengths.max()) if members else 1) < lengths[:, None]
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(members)), lengths - 1] = torch.tensor([float(m.reward or 0.0) for m in members])
    return rewards, mask


def _sample(group: Group, member: Scored, advantages: Tensor) -> Sample:
    prompt, rollout = group.prompt.token_ids, member.rollout
    start, length = len(prompt), len(prompt) + len(rollout.token_ids)
    sample = Sample(
        prompt_index=group.prompt.index,
        token_ids=torch.tensor([*prompt, *rollout.token_ids]),
        response_mask=torch.arange(length) >= start,
        rollout_logprobs=torch.zeros(length),
        advantages=torch.zeros(length),
        versions=torch.full((length,), -1),
    )
    sample.rollout_logprobs[start:] = torch.tensor(rollout.logprobs)
    sample.advantages[start:] = advantages[: length - start]
    for span in rollout.spans:
        sample.versions[start + span.start : start + span.end] = span.version
    return sample


_FIELDS = ("token_ids", "response_mask", "rollout_logprobs", "advantages", "versions")


def encode(samples: Sequence[Sample]) -> bytes:
    """Samples as safetensors bytes (no pickle), about 25 bytes a token; no bytes for no samples."""
    if not samples:
        return b""
    tensors = {name: torch.cat([getattr(s, name) for s in samples]) for name in _FIELDS}
    tensors["lengths"] = torch.tensor([s.token_ids.numel() for s in samples])
    tensors["prompts"] = torch.tensor([s.prompt_index for s in samples])
    return save_tensors(tensors)


def decode(data: bytes) -> list[Sample]:
    """The samples that `encode` wrote."""
    if not data:
        return []
    tensors = load_tensors(data)
    lengths = tensors.pop("lengths").tolist()
    prompts = tensors.pop("prompts").tolist()
    columns = [tensors[name].split(lengths) for name in _FIELDS]
    return [Sample(int(prompt), *row) for prompt, *row in zip(prompts, *columns, strict=True)]
