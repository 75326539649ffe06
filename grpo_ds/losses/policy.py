"""The built-in policy losses.

q = logprobs - old_logprobs; rho = exp(q); A the token's advantage; sg stops the gradient. Every loss is to be minimised.
Where exp is taken its argument is clamped to +-20, and only there: a mean over a sequence is the mean of q itself. In
the examples one token has rho = 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_ds.losses.base import LOG_RATIO_LIMIT, register, sequence_means

Result = tuple[Tensor, dict[str, Tensor]]


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    return logprobs - old_logprobs.detach()


def _clamped(q: Tensor) -> Tensor:
    return q.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _stats(q: Tensor, **tokens: Tensor) -> dict[str, Tensor]:
    """Sums over tokens: the ratio, the k3 estimate of KL(old || current), and how many tokens each condition holds."""
    q = _clamped(q.detach().to(torch.float32))
    ratio = q.exp()
    sums = {"ratio_sum": ratio.sum(), "kl_old_sum": (ratio - 1 - q).sum()}
    return sums | {name: hit.detach().sum().to(torch.float32) for name, hit in tokens.items()}


def _check_bounds(low: float, high: float) -> None:
    if low < 0 or high < 0:
        raise ValueError(f"clip_ratio_low is {low} and clip_ratio_high is {high}, neither may be negative")


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's pessimistic maximum, and which tokens its clip holds on either side (those give no gradient)."""
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    held = {
        "clip_low_tokens": (advantages < 0) & (ratio < 1 - low),
        "clip_high_tokens": (advantages > 0) & (ratio > 1 + high),
    }
    return loss, held


@register("vanilla")
@dataclass(frozen=True, kw_only=True)
class Vanilla:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)); with `dual_clip` c and A < 0: min(-A c, that).  arXiv 1707.06347

    DAPO's clip-higher is low 0.2 and high 0.28. Dual clip: arXiv 1912.09729.

    >>> lp, old = torch.tensor([2.0]).log(), torch.zeros(1)
    >>> Vanilla()(lp, old, torch.tensor([1.0]), torch.tensor([0]))[0].item()  # clipped at 1.2
    -1.2000000476837158
    >>> Vanilla(dual_clip=1.5)(lp, old, torch.tensor([-1.0]), torch.tensor([0]))[0].item()
    1.5
    """

    clip_ratio_low: float = 0.2
    """rho is clipped below 1 - this."""
    clip_ratio_high: float = 0.2
    """rho is clipped above 1 + this."""
    dual_clip: float | None = None
    """Upper bound c > 1 of the loss of a token with A < 0, in units of |A|; null: none."""

    def __post_init__(self) -> None:
        _check_bounds(self.clip_ratio_low, self.clip_ratio_high)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip is {self.dual_clip}, it must be above 1")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor) -> Result:
        q = _log_ratio(logprobs, old_logprobs)
        loss, held = _clipped(_clamped(q).exp(), advantages, self.clip_ratio_low, self.clip_ratio_high)
        if self.dual_clip is not None:
            bound = -advantages * self.dual_clip
            held["dual_clip_tokens"] = (advantages < 0) & (loss > bound)
            loss = torch.where(advantages < 0, torch.minimum(bound, loss), loss)
        return loss, _stats(q, **held)


@register("gspo")
@dataclass(frozen=True, kw_only=True)
class Gspo:
    """`vanilla` with one ratio a sequence: exp(lp - sg(lp) + sg(s)), s the mean of q over the sequence.  arXiv 2507.18071

    The mean is over the whole sequence, so its bounds are far smaller than PPO's: the paper has 3e-4 and 4e-4.

    >>> lp = torch.tensor([4.0, 1.0]).log()  # mean log ratio is log 2
    >>> Gspo(clip_ratio_high=9.0)(lp, torch.zeros(2), torch.ones(2), torch.tensor([0, 0]))[0].tolist()
    [-2.0, -2.0]
    """

    clip_ratio_low: float = 0.2
    """The ratio is clipped below 1 - this."""
    clip_ratio_high: float = 0.2
    """The ratio is clipped above 1 + this."""

    def __post_init__(self) -> None:
        _check_bounds(self.clip_ratio_low, self.clip_ratio_high)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor) -> Result:
        q = _log_ratio(logprobs, old_logprobs).detach()
        s = _clamped(sequence_means(q, sequence_index))
        ratio = (logprobs - logprobs.detach() + s).exp()
        loss, held = _clipped(ratio, advantages, self.clip_ratio_low, self.clip_ratio_high)
        return loss, _stats(q, **held)


@register("cispo")
@dataclass(frozen=True, kw_only=True)
class Cispo:
    """-sg(clip(rho, 1 - low, 1 + high)) A lp: the clip bounds the weight, every token keeps a gradient.  arXiv 2506.13585

    >>> lp = torch.tensor([0.5]).log()
    >>> loss, _ = Cispo(clip_ratio_high=0.5)(lp, lp - torch.tensor([2.0]).log(), torch.tensor([2.0]), torch.tensor([0]))
    >>> bool(torch.isclose(loss, -1.5 * 2.0 * lp))
    True
    """

    clip_ratio_low: float = 0.2
    """rho is clipped below 1 - this."""
    clip_ratio_high: float = 0.2
    """rho is clipped above 1 + this."""

    def __post_init__(self) -> None:
        _check_bounds(self.clip_ratio_low, self.clip_ratio_high)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor) -> Result:
        q = _log_ratio(logprobs, old_logprobs).detach()
        ratio, low, high = _clamped(q).exp(), 1 - self.clip_ratio_low, 1 + self.clip_ratio_high
        loss = -ratio.clamp(low, high) * advantages * logprobs
        return loss, _stats(q, clip_low_tokens=ratio < low, clip_high_tokens=ratio > high)


@register("sapo")
@dataclass(frozen=True, kw_only=True)
class Sapo:
    """-A (4 / tau) sigmoid(tau (rho - 1)): a smooth gate in place of the clip.

    tau is `tau_pos` where A > 0, else `tau_neg`. At rho = 1 the gradient is that of -A rho.

    >>> Sapo(tau_pos=2.0)(torch.zeros(1), torch.zeros(1), torch.tensor([3.0]), torch.tensor([0]))[0].item()
    -3.0
    """

    tau_pos: float = 1.0
    """Steepness of the gate where A > 0."""
    tau_neg: float = 1.05
    """Steepness of the gate elsewhere."""

    def __post_init__(self) -> None:
        if self.tau_pos <= 0 or self.tau_neg <= 0:
            raise ValueError(f"tau_pos is {self.tau_pos} and tau_neg is {self.tau_neg}, both must be positive")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor) -> Result:
        q = _log_ratio(logprobs, old_logprobs)
        tau = torch.full_like(q, self.tau_neg).masked_fill(advantages > 0, self.tau_pos)
        return -advantages * 4 / tau * torch.sigmoid(tau * (_clamped(q).exp() - 1)), _stats(q)


@register("gmpo")
@dataclass(frozen=True, kw_only=True)
class Gmpo:
    """-A exp(mean over the sequence of sgn(A) min(sgn(A) q, sgn(A) clip(q, -low, high))).  arXiv 2507.20673

    The ratio of a sequence is the geometric mean of its tokens' ratios, each held on the side where its advantage would
    push further. The bounds are in log space. With `seq-mean-token-mean` this is the paper's loss.

    >>> q = torch.tensor([0.9, 0.1])  # the first is held at 0.3, so the mean is 0.2
    >>> loss, _ = Gmpo(clip_ratio_high=0.3)(q, torch.zeros(2), torch.ones(2), torch.tensor([0, 0]))
    >>> bool(torch.allclose(loss, -torch.tensor(0.2).exp()))
    True
    """

    clip_ratio_low: float = 0.2
    """q of a token with A < 0 is held at -this."""
    clip_ratio_high: float = 0.2
    """q of a token with A > 0 is held at this."""

    def __post_init__(self) -> None:
        _check_bounds(self.clip_ratio_low, self.clip_ratio_high)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor) -> Result:
        q = _log_ratio(logprobs, old_logprobs)
        sign = advantages.sign()
        held_q = sign * torch.minimum(sign * q, sign * q.clamp(-self.clip_ratio_low, self.clip_ratio_high))
        loss = -advantages * _clamped(sequence_means(held_q, sequence_index)).exp()
        low = (advantages < 0) & (q < -self.clip_ratio_low)
        high = (advantages > 0) & (q > self.clip_ratio_high)
        return loss, _stats(q, clip_low_tokens=low, clip_high_tokens=high)


@register("reinforce")
@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """-A lp, the score-function estimator without a ratio.

    >>> Reinforce()(torch.tensor([-0.5]), torch.zeros(1), torch.tensor([2.0]), torch.tensor([0]))[0].item()
    1.0
    """

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor) -> Result:
        return -advantages * logprobs, _stats(_log_ratio(logprobs, old_logprobs))


@register("gpg")
@dataclass(frozen=True, kw_only=True)
class Gpg(Reinforce):
    """-A lp, as in `reinforce`; the name of the paper that pairs it with estimator `gpg`.  arXiv 2504.02546"""
