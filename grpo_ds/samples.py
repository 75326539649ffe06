"""Scored groups -> samples with advantages, and their wire form. Pure.

Every per-token array of a sample has the length of its token_ids (prompt + response). Tokens that may not be trained
on (of a truncated response, of a policy too old) are masked here, after the estimator: the whole response was sampled
and earned its reward, so it counts in the statistics of its group and of the batch; all that comes later, denominators
included, sees the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from grpo_ds.types import Group, Sample, Scored

Estimator = Callable[..., tuple[Tensor, Tensor]]


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

    def trainable(self, group: Group) -> list[Scored]:
        """The members with a token, a reward and what the estimator needs; others stay out of statistics and loss.

        Without a token is what an engine that was told to abort had not begun: there is nothing to put a reward on.
        """
        if self.greedy_baseline and (group.baseline is None or group.baseline.reward is None):
            return []
        usable = [
            m
            for m in group.members
            if m.rollout.token_ids
            and m.reward is not None
            and not (self.functions and any(m.parts[f] is None for f in self.functions))
        ]
        return usable if len(usable) >= self.min_group_size else []

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
        advantages, _ = self.estimator(rewards, mask, index, **self._needs([(g, m) for _, g, m in members]))
        samples = [_sample(group, member, row) for (_, group, member), row in zip(members, advantages, strict=True)]
        for (_, _, member), sample in zip(members, samples, strict=True):
            if self.mask_truncated and member.rollout.finish_reason == "length":
                sample.response_mask.zero_()
            sample.response_mask.logical_and_(sample.versions >= oldest)
        return samples

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
