"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import Tensor

from grpo_ds.config import RecipeError


def _k1(d: Tensor) -> Tensor:
    return d


def _abs(d: Tensor) -> Tensor:
    return d.abs()


def _k2(d: Tensor) -> Tensor:
    return d.square() / 2


def _k3(d: Tensor) -> Tensor:
    negative = (-d).clamp(-20.0, 20.0)
    return (negative.exp() - 1 - negative).clamp(-10.0, 10.0)


_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": _k1,
    "abs": _abs,
    "k2": _k2,
    "mse": _k2,
    "k3": _k3,
    "low_var": _k3,
}


def check_kl_name(name: str) -> None:
    """RecipeError unless `name` is one of the estimates, with or without a trailing +."""
    if name.removesuffix("+") not in _ESTIMATES:
        near = difflib.get_close_matches(name, _ESTIMATES, n=1)
        raise RecipeError(
            f"no KL estimate is called {name!r}{f', did you mean {near[0]!r}?' if near else ''} "
            f"(there are: {', '.join(_ESTIMATES)}, each also with a trailing +)"
        )


def kl_estimate(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Elementwise estimate of the KL to the reference; with d = logprobs - ref_logprobs:

    - `k1`: d (unbiased, high variance)
    - `abs`: |d|
    - `k2`, `mse`: d^2 / 2 (its gradient is the unbiased one of the KL)
    - `k3`, `low_var`: e^-d - 1 + d (unbiased, never negative), with -d clamped to +-20 and the result to +-10

    A trailing + keeps the value and takes the gradient of k2. The gradient flows through `logprobs` alone.

    >>> import torch
    >>> lp = torch.tensor([2.0], requires_grad=True)
    >>> kl = kl_estimate("k1+", lp, torch.tensor([-1.0]))
    >>> kl.backward()
    >>> kl.item(), lp.grad.item()
    (3.0, 3.0)
    """
    check_kl_name(name)
    d = logprobs - ref_logprobs.detach()
    value = _ESTIMATES[name.removesuffix("+")](d)
    if not name.endswith("+"):
        return value
    gradient = _k2(d)
    return value.detach() + (gradient - gradient.detach())
