"""The truth about gradients: float64, one sequence at a time, plain autograd, formulas written down a second time.

Uses nothing of grpo_ds. d = lp - lp_ref, q = lp - lp_old, w = exp(lp_old - lp_roll).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.dist.cases import GAMMA, GROUPS, KL_COEF, MAX_RESPONSE_TOKENS, TEMPERATURE, TRUNCATED, GradientCase

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
    a, roll = (raw[k][mask].double() for k in ("advantages", "rollout_logprobs"))
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
    if case.kl == "loss":
        d = lp - raw["ref"][mask].double()
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


_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": lambda d: d.abs(),
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
}


def _grpo(rewards: dict[int, Tensor]) -> dict[int, Tensor]:
    """(R_i - mean) / (std + 1e-6) of its group; mean 0 and std 1 for one alone."""
    out = {}
    for i, row in rewards.items():
        group = torch.stack([r.sum() for j, r in rewards.items() if GROUPS[j] == GROUPS[i]])
        mean, std = (group.mean(), group.std()) if len(group) > 1 else (0.0, 1.0)
        out[i] = ((row.sum() - mean) / (std + 1e-6)).expand_as(row)
    return out


def _reinforce(rewards: dict[int, Tensor]) -> dict[int, Tensor]:
    """Discounted sums of what follows, whitened over all tokens."""
    returns = {}
    for i, row in rewards.items():
        steps = torch.arange(len(row))
        powers = GAMMA ** (steps[None, :] - steps[:, None]).clamp(min=0).double()
        returns[i] = (powers * (steps[None, :] >= steps[:, None]) * row).sum(1)
    everything = torch.cat(list(returns.values()))
    scale = (everything.var() + 1e-8).sqrt()
    return {i: (values - everything.mean()) / scale for i, values in returns.items()}


def _penalised(
    case: GradientCase, policy: Any, models: dict[str, Any], rollouts: list[dict[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """The rollouts as samples whose advantages come from rewards with the KL taken off, token by token."""
    estimator, kind = case.spread
    samples, rewards = dict(enumerate(rollouts)), {}
    for i, raw in enumerate(rollouts):
        if raw["reward"].isnan():
            del samples[i]
            continue
        with torch.no_grad():
            old = logprobs(models["start"] if case.old else policy, raw)
            ref = logprobs(models["reference"], raw)
        rewards[i] = -KL_COEF * _PENALTIES[kind](old - ref)
        rewards[i][-1] += raw["reward"].double()
        samples[i] = {**raw, "old": torch.zeros(len(raw["token_ids"]), dtype=torch.float64)}
        samples[i]["old"][raw["response_mask"]] = old
    for i, values in (_grpo if estimator == "grpo" else _reinforce)(rewards).items():
        samples[i]["advantages"] = torch.zeros_like(samples[i]["old"])
        samples[i]["advantages"][samples[i]["response_mask"]] = values
        if i == TRUNCATED:
            samples[i]["response_mask"] = torch.zeros_like(samples[i]["response_mask"])
    return samples


def round_gradients(
    case: GradientCase, policy: Any, models: dict[str, Any], rollouts: list[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """With the KL in the reward: the gradient of each optimizer step of a round, two groups a step or all in one."""
    samples = _penalised(case, policy, models, rollouts)
    steps = ((0, 1), (2, 3)) if case.old else ((0, 1, 2, 3),)
    return [gradient(case, policy, [raw for i, raw in samples.items() if GROUPS[i] in groups]) for groups in steps]


def gradient(case: GradientCase, model: Any, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the loss by parameter name; a tied weight once."""
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(case, model, samples), params), strict=True))


def relative_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """|found - truth| / |truth| over all parameters together."""
    assert found.keys() == truth.keys()
    difference = torch.cat([(found[k].double() - truth[k]).flatten() for k in truth])
    return float(difference.norm() / torch.cat([truth[k].flatten() for k in truth]).norm())
