"""The KL coefficient: fixed, or adapted towards a target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KlController:
    """Adaptive coefficient of Ziegler et al. (arXiv 1909.08593, section 2.2); fixed without a target.

    e = clip(kl / target - 1, -0.2, 0.2);  coef <- coef * (1 + e * min(samples / horizon, 1))

    The paper moves by a tenth of e after each batch; here the step grows with the samples that the measurement is of,
    up to the whole error. So a round changes the coefficient by a factor of 0.8 to 1.2, whatever its size: without the
    minimum, more than 5 horizons in a round would make it negative, and reward distance from the reference.

    >>> control = KlController(coef=0.1, target=0.05, horizon=100)
    >>> control.update(kl=0.1, samples=50)
    >>> round(control.coef, 6)
    0.11
    >>> control.update(kl=0.0, samples=65_536)
    >>> round(control.coef, 6)
    0.088
    """

    coef: float
    """The coefficient now; part of the checkpoint."""
    target: float | None
    """Mean KL a token to aim at, in nats."""
    horizon: int
    """Samples over which the coefficient changes by the whole error; a round is never counted as more."""

    def update(self, kl: float, samples: int) -> None:
        """After a round: `kl` is its mean a token, in nats."""
        if self.target is None:
            return
        error = min(0.2, max(-0.2, kl / self.target - 1))
        self.coef *= 1 + error * min(samples / self.horizon, 1.0)
