"""Whether an engine still answers with the weights of the last gate, by log-probabilities alone. Pure.

On a token whose log-probability the policy has moved by m = then - now, an engine with the new weights differs from the
trainer by rounding, one with the old weights by m and rounding. So (engine - now) over m has a slope near 0 or near 1,
with an error that falls with the number of tokens. Where rounding outweighs the move both slopes come near 1/2, because
the trainer's own rounding is on both sides; nothing is said then. On 1,000 tokens in 16 bits, with errors of 0.02 nats,
moves of 0.04 are enough; in float32 any step is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from grpo_ds.types import Prompt, Rollout

_NEAR = 0.2
"""From 1; a slope that comes of rounding alone is 0.3 further away, six times the error that is allowed."""
_ERROR = 0.05
"""Largest standard error of a slope that tells anything."""
_TOKENS = 30
"""Least number of tokens of equal weight that must have made the slope: a few could do so by chance."""

Scored = tuple[Prompt, Rollout, Tensor]
"""An answer, and (R,) log-probabilities of its tokens under the policy at that time."""


def stands_still(now: Sequence[Scored], then: Sequence[Scored]) -> str:
    """How the engines of a node, asked the same as then, answer: "exactly" as then, "still" by then's weights, or "".

    "still" may be said of one of several servers: all answers to a prompt are one server's.
    """
    pairs = list(zip(now, then, strict=True))
    if all(a.token_ids == b.token_ids and a.logprobs == b.logprobs for (_, a, _), (_, b, _) in pairs):
        moved = any(not torch.equal(a, b) for (*_, a), (*_, b) in pairs)
        return "exactly" if moved else ""
    prompts = [list(rows) for _, rows in groupby(pairs, key=lambda pair: pair[0][0].index)]
    return "still" if any(_follows_then(rows) for rows in [*prompts, pairs]) else ""


def _follows_then(pairs: Sequence[tuple[Scored, Scored]]) -> bool:
    rows = torch.cat([torch.empty(0, 3, dtype=torch.float64), *(_shared(now, then) for now, then in pairs)])
    if not rows.isfinite().all():
        return False
    engine, ours_now, ours_then = rows.unbind(1)
    return has_slope_one(ours_then - ours_now, engine - ours_now)


def _shared(now: Scored, then: Scored) -> Tensor:
    """(tokens before the first differing one, 3): the engine's log-probabilities, the trainer's, the trainer's of then."""
    (_, answer, ours_now), (_, old, ours_then) = now, then
    same = sum(1 for _ in _equal_prefix(answer.token_ids, old.token_ids))
    engine = torch.tensor(answer.logprobs[:same], dtype=torch.float64)
    return torch.stack([engine, ours_now[:same].double(), ours_then[:same].double()], 1)


def _equal_prefix(one: Sequence[int], other: Sequence[int]) -> Iterator[int]:
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a


def has_slope_one(moved: Tensor, off: Tensor) -> bool:
    """Whether off = moved + noise, and surely not off = noise; (N,) float64. The noise may differ from token to token."""
    squares = moved.square()
    total = squares.sum()
    if total**2 < _TOKENS * squares.square().sum() or total == 0:
        return False
    slope = (off * moved).sum() / total
    error = (squares * (off - slope * moved).square()).sum().sqrt() / total
    return bool((slope - 1).abs() < _NEAR and error < _ERROR)
