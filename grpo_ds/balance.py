"""Moves each sample once, from the node that made it to the rank that trains on it, and values per token back.

Sizes are agreed on first (three integers a sample); from them every rank computes the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ds.batching import Layout, MicroBatch, SampleSize, UpdatePlan, collate, plan_updates
from grpo_ds.config import Recipe
from grpo_ds.dist import Ranks
from grpo_ds.samples import decode, encode
from grpo_ds.types import Sample


@dataclass(frozen=True)
class Assignment:
    """Who trains on what in a round."""

    samples: dict[int, Sample]
    """This rank's samples by their index in the plan."""
    plan: list[UpdatePlan]
    source: list[tuple[int, int]]
    """Of every sample of the plan: the rank that made it, and its position there."""
    target: dict[int, int]
    """Of every sample of the plan: the rank that trains on it."""
    lengths: list[int]
    """Of every sample of the plan: its response tokens."""

    def micro_batches(self, rank: int, layout: Layout, device: torch.device) -> list[list[MicroBatch]]:
        """[optimizer step][micro-batch] of this rank, as tensors."""
        return [
            [collate([self.samples[i] for i in micro], layout).to(device) for micro in step.micro_batches[rank]]
            for step in self.plan
        ]


def assign(recipe: Recipe, ranks: Ranks, layout: Layout, order: Sequence[int], made: Sequence[Sample]) -> Assignment:
    """Balances all samples over all ranks by tokens. Every rank calls it.

    order: prompt indices of the round, ascending; made: the samples this rank made.
    """
    position = {prompt: k for k, prompt in enumerate(order)}
    rows = [[position[s.prompt_index], s.token_ids.numel(), int(s.response_mask.sum())] for s in made]
    gathered = ranks.all_gather(rows, "sample sizes")
    # Prompt order, not node order: the plan must not depend on who generated what.
    entries = sorted((row[0], rank, k, row) for rank, part in enumerate(gathered) for k, row in enumerate(part))
    if not entries:
        raise RuntimeError(
            f"{ranks.where}: none of the kept groups has a sample to train on: their rewards cannot be scored, look at "
            "rollouts/ of this round"
        )
    plan = plan_updates(
        [SampleSize(*row) for *_, row in entries],
        world=ranks.world,
        budget=recipe.train.micro_batch_tokens,
        layout=layout,
        groups_per_update=recipe.prompts_per_update,
        max_response_tokens=recipe.rollout.max_response_tokens,
    )
    target = {i: rank for step in plan for rank, micros in enumerate(step.micro_batches) for m in micros for i in m}
    outgoing: list[list[Sample]] = [[] for _ in range(ranks.world)]
    expected: list[list[int]] = [[] for _ in range(ranks.world)]
    for i, (_, source, k, _) in enumerate(entries):
        if source == ranks.rank:
            outgoing[target[i]].append(made[k])
        if target[i] == ranks.rank:
            expected[source].append(i)
    received = ranks.exchange([encode(part) for part in outgoing], "samples")
    mine = [zip(ids, decode(data), strict=True) for ids, data in zip(expected, received, strict=True)]
    samples = {i: sample for part in mine for i, sample in part}
    return Assignment(samples, plan, [(r, k) for _, r, k, _ in entries], target, [row[2] for *_, row in entries])


def per_token_home(assignment: Assignment, ranks: Ranks, values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sends each sample's part of `values`, [optimizer step][micro-batch] (M,), to the rank that made the sample.

    Returns (R,) float32 tensors in the order in which this rank made its samples. Every rank calls it.
    """
    parts: dict[int, Tensor] = {}
    for step, row in zip(assignment.plan, values, strict=True):
        for ids, value in zip(step.micro_batches[ranks.rank], row, strict=True):
            parts |= dict(zip(ids, value.float().cpu().split([assignment.lengths[i] for i in ids]), strict=True))
    outgoing: list[list[Tensor]] = [[] for _ in range(ranks.world)]
    incoming: list[list[int]] = [[] for _ in range(ranks.world)]
    for i, (source, _) in enumerate(assignment.source):
        if i in parts:
            outgoing[source].append(parts[i])
        if source == ranks.rank:
            incoming[assignment.target[i]].append(i)
    sent = [torch.cat([torch.empty(0), *tensors]).numpy().tobytes() for tensors in outgoing]
    received = ranks.exchange(sent, "values per token")
    home: dict[int, Tensor] = {}
    for indices, data in zip(incoming, received, strict=True):
        flat = torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.empty(0)
        for i, piece in zip(indices, flat.split([assignment.lengths[i] for i in indices]), strict=True):
            home[assignment.source[i][1]] = piece
    return [home[k] for k in sorted(home)]
