"""The truth about gradients: float64, one sequence at a time, plain autograd, formulas written down a second time.

Uses nothing of grpo_ds. d = lp - lp_ref, q = lp - lp_old, w = exp(lp_old - lp_roll).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.dist.cases import KL_COEF, MAX_RESPONSE_TOKENS, TEMPERATURE, GradientCase

LOW, HIGH = 0.2, 0.28
UPPER, LOWER = 2.0, 0.5


def logprobs(model: Any, raw: dict[str, Tensor]) -> Tensor:
    """(L,) log-probabilities of the response tokens."""
    ids, where = raw["token_ids"], raw["response_mask"].nonzero().squeeze(1)
    logits = model(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE
    picked: Tensor = logits.log_softmax(-1)[where - 1, ids[where]]
    return picked


def token_losses(case: GradientCase, lp: Tensor, raw: dict[str, Tensor]) -> Tensor:
    """(L,) losses of one sequence's response tokens."""
    mask = raw["response_mask"]
    a, roll, ref = (raw[k][mask].double() for k in ("advantages", "rollout_logprobs", "ref"))
    old = raw["old"][mask].double() if case.old else lp.detach()
    q = lp - old
    rho = q.exp()
    if case.loss == "vanilla":
        loss = torch.maximum(-a * rho, -a * rho.clamp(1 - LOW, 1 + HIGH))
    elif case.loss == "gspo":
        ratio = (lp - lp.detach() + q.detach().mean()).exp()
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))
    elif case.loss == "cispo":
        loss = -rho.detach().clamp(1 - LOW, 1 + HIGH) * a * lp
    elif case.loss == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05).double()
        loss = -a * 4 / tau / (1 + (-tau * (rho - 1)).exp())
    elif case.loss == "gmpo":
        held = torch.where(a > 0, torch.minimum(q, q.clamp(-LOW, HIGH)), torch.maximum(q, q.clamp(-LOW, HIGH)))
        loss = -a * held.mean().exp()
    else:
        loss = -a * lp
    loss = loss * _weights(case, old, roll)
    if case.kl:
        d = lp - ref
        loss = loss + KL_COEF * ((-d).exp() - 1 + d)
    return loss


def _weights(case: GradientCase, old: Tensor, roll: Tensor) -> Tensor:
    level, mode = case.importance
    if level == "off":
        return torch.ones_like(old)
    w = (old - roll).detach().exp()
    if level == "sequence":
        w = w.prod().expand_as(old)
    if mode == "truncate":
        return w.clamp(max=UPPER)
    return w * ((w >= LOWER) & (w <= UPPER))


def loss(case: GradientCase, model: Any, samples: list[dict[str, Tensor]]) -> Tensor:
    """The loss of the optimizer step, a scalar."""
    parts = [token_losses(case, logprobs(model, raw), raw) for raw in samples if raw["response_mask"].any()]
    if case.mode == "token-mean":
        return torch.stack([p.sum() for p in parts]).sum() / sum(len(p) for p in parts)
    if case.mode == "seq-mean-token-mean":
        return torch.stack([p.mean() for p in parts]).mean()
    mean = torch.stack([p.sum() for p in parts]).mean()
    return mean if case.mode == "seq-mean-token-sum" else mean / MAX_RESPONSE_TOKENS


def gradient(case: GradientCase, model: Any, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the loss by parameter name; a tied weight once."""
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(case, model, samples), params), strict=True))


def relative_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """|found - truth| / |truth| over all parameters together."""
    assert found.keys() == truth.keys()
    difference = torch.cat([(found[k].double() - truth[k]).flatten() for k in truth])
    return float(difference.norm() / torch.cat([truth[k].flatten() for k in truth]).norm())
