"""Which rank trains on which sample, in which micro-batch, in which optimizer step.

Every rank computes the same plan from the same list of sizes, so nothing but the sizes (three integers a sample) is
exchanged for it. Two rules hold for every plan: all ranks get the same number of micro-batches in an optimizer step
(unequal numbers of passes hang ZeRO-3), and the denominators of the loss are counts over the whole optimizer step,
whatever the split.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grpo_ds.losses import Totals

Layout = Literal["padded", "packed"]
"""padded: (B, longest) with an attention mask, for sdpa and eager. packed: (1, sum of lengths), for flash attention."""


@dataclass(frozen=True, slots=True)
class SampleSize:
    """What the plan needs to know about one sample."""

    group: int
    """Order of its group in the round; optimizer steps take whole groups in this order."""
    tokens: int
    """Length T of the sequence, prompt included."""
    response_tokens: int
    """Tokens with response_mask True."""


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """One optimizer step."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """[rank][micro-batch] -> indices of samples; every rank has the same number of micro-batches, some may be empty."""
    totals: Totals
    """Step-wide counts: the one denominator of all ranks and micro-batches."""

    @property
    def samples(self) -> int:
        """Number of samples in the step."""
        return sum(len(micro) for rank in self.micro_batches for micro in rank)


def _cost(count: int, longest: int, total: int, layout: Layout) -> int:
    return count * longest if layout == "padded" else total


def _fill(order: Sequence[int], sizes: Sequence[SampleSize], bins: int, budget: int, layout: Layout) -> list[list[int]]:
    """Longest first, always into the cheapest bin; returns [] when a bin would exceed the budget."""
    content: list[list[int]] = [[] for _ in range(bins)]
    totals = [0] * bins
    heap = [(0, b) for b in range(bins)]
    for i in order:
        _, b = heapq.heappop(heap)
        content[b].append(i)
        totals[b] += sizes[i].tokens
        cost = _cost(len(content[b]), sizes[content[b][0]].tokens, totals[b], layout)
        if cost > budget:
            return []
        heapq.heappush(heap, (cost, b))
    return content


def _cut(
    sizes: Sequence[SampleSize], members: Sequence[int], world: int, budget: int, layout: Layout
) -> list[list[int]]:
    """The fewest micro-batches, a multiple of the world size, that respect the token budget."""
    order = sorted(members, key=lambda i: (-sizes[i].tokens, i))
    per_rank = max(1, -(-sum(sizes[i].tokens for i in order) // (budget * world)))
    while True:
        bins = _fill(order, sizes, per_rank * world, budget, layout)
        if bins:
            return bins
        # A few more at a time: near-full bins rarely fit with one more, and the search must stay short for large N.
        per_rank += max(1, per_rank // 16)


def plan_updates(
    sizes: Sequence[SampleSize],
    *,
    world: int,
    budget: int,
    layout: Layout,
    groups_per_update: int,
    max_response_tokens: int,
) -> list[UpdatePlan]:
    """Cuts the round into optimizer steps, ranks and micro-batches.

    sizes: one entry a sample, in the order that indices refer to. budget: tokens of one micro-batch, padding included.
    Raises ValueError when one sample alone exceeds the budget (a sequence is never split).

    >>> plan = plan_updates([SampleSize(0, 6, 2), SampleSize(0, 4, 1), SampleSize(1, 5, 3)], world=2, budget=8,
    ...                     layout="packed", groups_per_update=2, max_response_tokens=4)
    >>> plan[0].micro_batches, plan[0].totals.tokens
    ((((0,), ()), ((2,), (1,))), 6)
    """
    for i, size in enumerate(sizes):
        if size.tokens > budget:
            raise ValueError(f"sample {i} has {size.tokens} tokens, above train.micro_batch_tokens ({budget})")
    groups = sorted({size.group for size in sizes})
    updates = []
    for start in range(0, len(groups), groups_per_update):
        chosen = set(groups[start : start + groups_per_update])
        members = [i for i, size in enumerate(sizes) if size.group in chosen]
        bins = _cut(sizes, members, world, budget, layout)
        bins.sort(key=lambda b: -sum(sizes[i].tokens for i in b))
        # Boustrophedon dealing: rank totals stay close although bins differ.
        ranks: list[list[tuple[int, ...]]] = [[] for _ in range(world)]
        for k, content in enumerate(bins):
            row, column = divmod(k, world)
            ranks[column if row % 2 == 0 else world - 1 - column].append(tuple(content))
        totals = Totals(
            tokens=sum(sizes[i].response_tokens for i in members),
            sequences=sum(sizes[i].response_tokens > 0 for i in members),
            max_response_tokens=max_response_tokens,
        )
        updates.append(UpdatePlan(tuple(tuple(r) for r in ranks), totals))
    return updates
