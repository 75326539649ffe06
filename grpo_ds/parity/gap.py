"""What the parity gate judges: the gap between two sets of log-probabilities, its limits, and which hypothesis explains it.

A hypothesis says what the engine may have done otherwise than the trainer. It is tried by computing the trainer's
log-probabilities as if it were true; it explains the gap when little is left of it. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ds.config import SyncConfig

_BINS_PER_DECADE, _SMALLEST, _DECADES = 50, -10, 13
"""The histogram spans gaps of 1e-10 to 1e3 nats; a bin is 4.7 percent wide, which is the error of the percentile."""
_BINS = _BINS_PER_DECADE * _DECADES
_FEWER = 10.0
"""A hypothesis explains a gap of which less than this part is left."""


@dataclass(frozen=True)
class Limits:
    """Largest |trainer - engine| log-probability of the probe tokens, in nats."""

    mean: float
    p99: float
    max: float


_DEFAULT = {"float32": Limits(1e-4, 1e-3, 1e-2)}
_DEFAULT_16_BITS = Limits(0.05, 0.5, 5.0)
"""Kernels that round to 16 bits in another order differ by 0.1 on several percent of the tokens. The tails are made of
few tokens, the mean of all: it is much the same from probe to probe, some 0.01, and can be held far tighter."""


def limits_of(config: SyncConfig, dtype: str) -> Limits:
    """sync.parity_mean, sync.parity_p99 and sync.parity_max, or what the trainer's dtype allows."""
    usual = _DEFAULT.get(dtype, _DEFAULT_16_BITS)
    return Limits(
        usual.mean if config.parity_mean is None else config.parity_mean,
        usual.p99 if config.parity_p99 is None else config.parity_p99,
        usual.max if config.parity_max is None else config.parity_max,
    )


@dataclass(frozen=True)
class Gap:
    """Differences engine - trainer over the probe tokens of a node, in nats, or the `worst` of all nodes.

    NaN where a token has none.
    """

    tokens: int
    bad: int
    """Tokens without a finite number on both sides."""
    mean: float
    """Of |difference|."""
    p99: float
    """Of |difference|, to 5 percent from above."""
    max: float
    below: float
    """The largest trainer - engine: about 0 where the engine samples from fewer tokens."""

    def within(self, limits: Limits) -> bool:
        """Whether the gate lets it pass; no token, or one that is not a number, does not."""
        return self.tokens > 0 and self.mean <= limits.mean and self.p99 <= limits.p99 and self.max <= limits.max


def gap_stats(trainer: Tensor, engine: Tensor) -> dict[str, Tensor]:
    """Mergeable statistics (names `*_max` by maximum, all others by addition) of (M,) log-probabilities, float64."""
    difference = engine.double().cpu() - trainer.double().cpu()
    finite = difference.isfinite()
    size = difference[finite].abs()
    nothing = size.new_zeros(1)  # the maximum of no tokens is 0
    bins = ((size.clamp(min=1e-300).log10() - _SMALLEST) * _BINS_PER_DECADE).floor().clamp(0, _BINS - 1).long()
    return {
        "tokens": torch.tensor(float(difference.numel()), dtype=torch.float64),
        "bad": (~finite).double().sum(),
        "sum": size.sum(),
        "histogram": torch.bincount(bins, minlength=_BINS).double(),
        "gap_max": torch.cat([size, nothing]).max(),
        "below_max": torch.cat([-difference[finite], nothing]).max(),
    }


def gap_of(stats: dict[str, Tensor]) -> Gap:
    """Statistics that were merged over micro-batches and ranks -> the gap."""
    tokens, bad = int(stats["tokens"]), int(stats["bad"])
    if bad:
        return Gap(tokens, bad, *(math.nan,) * 4)
    largest = float(stats["gap_max"])
    reached = stats["histogram"].cumsum(0) >= math.ceil(0.99 * tokens)
    edge = 10.0 ** ((int(reached.long().argmax()) + 1) / _BINS_PER_DECADE + _SMALLEST)
    mean = float(stats["sum"]) / max(tokens, 1)
    return Gap(tokens, bad, mean, min(edge, largest), largest, float(stats["below_max"]))


def worst(nodes: Sequence[Gap]) -> Gap:
    """Each number where it is largest: a node that disagrees is not diluted by those that agree."""
    tokens, bad = sum(gap.tokens for gap in nodes), sum(gap.bad for gap in nodes)
    if bad:
        return Gap(tokens, bad, *(math.nan,) * 4)
    return Gap(tokens, bad, *(max(getattr(gap, name) for gap in nodes) for name in ("mean", "p99", "max", "below")))


def farthest(nodes: Sequence[Gap], limits: Limits) -> int:
    """The node whose gap exceeds the limits most."""

    def excess(gap: Gap) -> float:
        return max(gap.mean / limits.mean, gap.p99 / limits.p99, gap.max / limits.max)

    return max(range(len(nodes)), key=lambda node: excess(nodes[node]))


# ---- which hypothesis ----


@dataclass(frozen=True)
class Finding:
    """A hypothesis that was tried."""

    name: str
    """Two or three words: temperature, top-k, output head, ..."""
    says: str
    """The sentence to print when it explains the gap."""
    left: Gap
    """The gap if it is true."""
    alike: bool = False
    """It makes errors of the same size at the same tokens, although not the same numbers (another dtype)."""


def explains(found: Gap, finding: Finding, limits: Limits) -> bool:
    """Whether little of the gap is left, or it is the same kind of rounding."""
    left = finding.left
    much_less = left.p99 * _FEWER <= found.p99 and left.mean * _FEWER <= found.mean
    return left.within(limits) or much_less or finding.alike


def cause(found: Gap, findings: Sequence[Finding], limits: Limits) -> Finding | None:
    """The hypothesis that explains the gap best.

    Of those that leave a gap within the limits it is the first; a gap that rounding alone could make tells them apart
    no more. Else it is the one that leaves the smallest p99, else one that is merely alike.
    """
    able = [finding for finding in findings if explains(found, finding, limits)]
    whole = [finding for finding in able if finding.left.within(limits)]
    most = sorted((finding for finding in able if not finding.alike), key=lambda finding: finding.left.p99)
    return next(iter([*whole, *most, *able]), None)


def diagnosis(found: Gap, findings: Sequence[Finding], limits: Limits) -> str:
    """What the run is stopped with, after the numbers."""
    if found.tokens == 0:
        return "No cause looked for: the probe has no token"
    if found.bad:
        return f"No cause looked for: {found.bad} log-probabilities are not finite, on one side or on both"
    if chosen := cause(found, findings, limits):
        return f"Cause: {chosen.says} (what is left of the gap then: p99 {chosen.left.p99:.2g} nats)"
    tried = ", ".join(
        f"{finding.name} ({'impossible' if finding.left.bad else f'leaves p99 {finding.left.p99:.2g}'})"
        for finding in findings
    )
    return f"No cause found; ruled out: {tried}{_hint(found)}"


def _hint(found: Gap) -> str:
    if found.below * _FEWER <= found.max:
        return "; the engine's log-probability is never the lower one, so it samples from fewer tokens than the trainer"
    return (
        "; engine.args that change the model (quantization, rope, attention) and the server's log are left to look at"
    )
