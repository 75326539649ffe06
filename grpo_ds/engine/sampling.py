"""Sampling that depends on seed, position and distribution only, for engines whose own does not. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014); int64 in and out, overflow wraps."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MULTIPLIERS[0]
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MULTIPLIERS[1]
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, position): (B,) int64 each in, (B,) float64 out.

    Number p of seed s is output p of SplitMix64 started at the hash of s.
    """
    hashed = _mix(_mix(seeds) + (positions.to(torch.int64) + 1) * _GAMMA)
    return (hashed >> 11 & (1 << 53) - 1).double() / (1 << 53)


def restrict_(probs: Tensor, top_ks: Tensor, top_ps: Tensor) -> None:
    """Apply top-k, then top-p to (B, V) probabilities in place, rescaled to sum 1; top_ps >= 1 switches it off."""
    ordered, order = probs.sort(-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ordered[rank >= top_ks.view(-1, 1)] = 0
    ordered /= ordered.sum(-1, keepdim=True)
    top_ps = top_ps.view(-1, 1)
    ordered[(ordered.cumsum(-1) - ordered >= top_ps) & (top_ps < 1)] = 0
    probs.scatter_(-1, order, ordered / ordered.sum(-1, keepdim=True))


def draw(probs: Tensor, numbers: Tensor) -> Tensor:
    """Invert the distribution function: (B, V) probabilities and (B,) numbers in [0, 1) to (B,) int64 tokens."""
    cumulated = probs.double().cumsum(-1)
    reached = (numbers * cumulated[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulated, reached, right=True).squeeze(1).clamp(max=probs.shape[-1] - 1)
