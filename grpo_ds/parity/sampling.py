"""Log-probabilities of tokens as another sampler or dtype would have reported them, and what gives those away. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ds.engine.sampling import restrict_

_LIKENESS = 0.3
"""Correlation of two rounding errors above which they have the same origin; by chance it is about 1/sqrt(tokens)."""
_LARGEST_K = 4096
"""Largest top-k that is looked for."""


# ---- temperature ----


def at_temperatures(logits: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
    """(M, len(temperatures)) log-probabilities of the targets; logits (M, V) float32, unscaled."""
    columns = []
    for temperature in temperatures:
        scaled = logits / temperature
        columns.append(scaled.gather(1, targets[:, None]).squeeze(1) - scaled.logsumexp(-1))
    return torch.stack(columns, 1)


def temperatures_around(centre: float, step: float) -> list[float]:
    """A geometric grid of 25 temperatures: centre x (1 + step)^(-12 .. 12)."""
    return [centre * (1 + step) ** k for k in range(-12, 13)]


# ---- top-k, top-p, min-p ----


@dataclass(frozen=True)
class Sampling:
    """A distribution that an engine may have sampled from."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __str__(self) -> str:
        off = Sampling(self.temperature)
        names = ("top_k", "top_p", "min_p")
        on = [f"{name} {getattr(self, name):.4g}" for name in names if getattr(self, name) != getattr(off, name)]
        return ", ".join([f"temperature {self.temperature:.4g}", *on])


def sampled_from(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    """(M,) log-probabilities of the targets after min-p, top-k and top-p, renormalised; logits (M, V) float32."""
    probs = (logits / sampling.temperature).softmax(-1)
    probs = torch.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), probs, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    count = logits.shape[0]
    top_k = torch.full((count,), sampling.top_k or logits.shape[-1], device=logits.device)
    restrict_(probs, top_k, torch.full((count,), sampling.top_p, device=logits.device))
    return probs.gather(1, targets[:, None]).squeeze(1).log()


def kept_tokens(logits: Tensor, targets: Tensor, engine: Tensor, temperature: float, above: float) -> Tensor:
    """What each token tells about a restriction: (M, 3) kept tokens k, their mass, and the last one's share of the first.

    An engine that samples from the k likeliest tokens reports log p - log(mass of the k). Rows where the engine is not
    more than `above` nats over the trainer say nothing and are NaN.
    """
    ordered = (logits / temperature).softmax(-1).sort(-1, descending=True).values.double()
    trainer = at_temperatures(logits, targets, [temperature]).squeeze(1)
    masses, mass = ordered.cumsum(-1), (trainer - engine).double().exp()
    nearest = (masses - mass[:, None]).abs().argmin(-1, keepdim=True)
    share = ordered.gather(1, nearest) / ordered[:, :1]
    rows = torch.cat([nearest.double() + 1, masses.gather(1, nearest), share], 1)
    return torch.where((engine - trainer > above)[:, None], rows, torch.nan)


def restriction_stats(rows: Tensor) -> dict[str, Tensor]:
    """Mergeable statistics of `kept_tokens`, as in `gap_stats`."""
    told = rows[~rows[:, 0].isnan()].cpu()
    nothing = torch.full((1, 3), 2.0, dtype=torch.float64)
    least = -torch.cat([told, nothing]).amin(0)
    counts = told[:, 0].long().clamp(max=_LARGEST_K)
    return {
        "counts": torch.bincount(counts, minlength=_LARGEST_K + 1).double(),
        "mass_max": least[1],
        "share_max": least[2],
    }


def restrictions(stats: dict[str, Tensor], temperature: float) -> list[tuple[str, Sampling]]:
    """(name, sampling) of the restrictions that merged statistics suggest; none where no token told anything.

    Top-k keeps the same number everywhere. Top-p keeps at least its mass everywhere, so the least mass seen keeps the
    same tokens; min-p likewise with the share.
    """
    if not stats["counts"].sum():
        return []
    slack = 1 - 1e-6  # of float32, in which they are compared
    mass, share = -float(stats["mass_max"]) * slack, -float(stats["share_max"]) * slack
    return [
        ("top-k", Sampling(temperature, top_k=int(stats["counts"].argmax()))),
        ("top-p", Sampling(temperature, top_p=min(mass, 1.0))),
        ("min-p", Sampling(temperature, min_p=min(share, 1.0))),
    ]


# ---- dtype ----


def likeness_stats(trainer: Tensor, engine: Tensor, variant: Tensor) -> dict[str, Tensor]:
    """Mergeable sums of products of the differences engine - trainer and variant - trainer, (M,) each."""
    one, other = engine.double().cpu() - trainer.double().cpu(), variant.double().cpu() - trainer.double().cpu()
    return {"both": (one * other).sum(), "one": one.square().sum(), "other": other.square().sum()}


def alike(stats: dict[str, Tensor]) -> bool:
    """Whether both differences are of the same size, within a factor 3, and fall on the same tokens."""
    one, other = float(stats["one"]) ** 0.5, float(stats["other"]) ** 0.5
    if not (0 < one < math.inf and 0 < other < math.inf):
        return False
    return 1 / 3 <= one / other <= 3 and float(stats["both"]) >= _LIKENESS * one * other
