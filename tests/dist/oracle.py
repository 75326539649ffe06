"""The truth about gradients: one process, one sequence at a time, plain autograd, formulas written down a second time.

Uses nothing of grpo_ds. d = lp - lp_ref, q = lp - lp_old, w = exp(lp_old - lp_roll). All in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist.cases import (
    FEW,
    GAMMA,
    GROUPS,
    KL_COEF,
    MAX_RESPONSE_TOKENS,
    TEMPERATURE,
    TRUNCATED,
    GradientCase,
    read_model,
    read_rollouts,
    read_samples,
)

LOW, HIGH = 0.2, 0.28
UPPER, LOWER = 2.0, 0.5


_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": lambda d: d.abs(),
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
}


def logprobs(model: Any, raw: dict[str, Tensor]) -> Tensor:
    """(L,) log-probabilities of the response tokens."""
    ids, where = raw["token_ids"], raw["response_mask"].nonzero().squeeze(1)
    logits = model(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE
    picked: Tensor = logits.log_softmax(-1)[where - 1, ids[where]]
    return picked


class Plain:
    """A model that does not change: one forward pass a sequence, whose graph stays for all cases."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def logprobs(self, raw: dict[str, Tensor]) -> Tensor:
        """As `logprobs`."""
        ids = raw["token_ids"]  # what copies of a sample share; kept, so that its number is not given to another one
        if id(ids) not in self._known:
            self._known[id(ids)] = ids, logprobs(self.model, raw)
        return self._known[id(ids)][1]


def token_losses(case: GradientCase, lp: Tensor, raw: dict[str, Tensor]) -> Tensor:
    """(L,) losses of one sequence's response tokens."""
    mask = raw["response_mask"]
    a, roll = (raw[k][mask].to(lp.dtype) for k in ("advantages", "rollout_logprobs"))
    old = raw["old"][mask].to(lp.dtype) if case.old else lp.detach()
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
        tau = torch.where(a > 0, 1.0, 1.05).to(lp.dtype)
        loss = -a * 4 / tau / (1 + (-tau * (rho - 1)).exp())
    elif case.loss == "gmpo":
        held = torch.where(a > 0, torch.minimum(q, q.clamp(-LOW, HIGH)), torch.maximum(q, q.clamp(-LOW, HIGH)))
        loss = -a * held.mean().exp()
    else:
        loss = -a * lp
    loss = loss * _weights(case, old, roll)
    if case.kl == "loss":
        kind = case.spread[1]
        # Straight through: whatever its value, the gradient is k2's.
        estimate = _ESTIMATES["k2" if kind.endswith("+") else kind]
        loss = loss + KL_COEF * estimate(lp - raw["ref"][mask].to(lp.dtype))
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


def loss(
    case: GradientCase, logprobs_of: Callable[[dict[str, Tensor]], Tensor], samples: list[dict[str, Tensor]]
) -> Tensor:
    """The loss of the optimizer step, a scalar."""
    parts = [token_losses(case, logprobs_of(raw), raw) for raw in samples if raw["response_mask"].any()]
    if case.mode == "token-mean":
        return torch.stack([p.sum() for p in parts]).sum() / sum(len(p) for p in parts)
    if case.mode == "seq-mean-token-mean":
        return torch.stack([p.mean() for p in parts]).mean()
    mean = torch.stack([p.sum() for p in parts]).mean()
    return mean if case.mode == "seq-mean-token-sum" else mean / MAX_RESPONSE_TOKENS


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
        powers = GAMMA ** (steps[None, :] - steps[:, None]).clamp(min=0).to(row.dtype)
        returns[i] = (powers * (steps[None, :] >= steps[:, None]) * row).sum(1)
    everything = torch.cat(list(returns.values()))
    scale = (everything.var() + 1e-8).sqrt()
    return {i: (values - everything.mean()) / scale for i, values in returns.items()}


def _penalised(
    case: GradientCase, policy: Plain, models: dict[str, Plain], rollouts: list[dict[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """The rollouts as samples whose advantages come from rewards with the KL taken off, token by token."""
    estimator, kind = case.spread
    samples, rewards = dict(enumerate(rollouts)), {}
    for i, raw in enumerate(rollouts):
        if raw["reward"].isnan():
            del samples[i]
            continue
        old = (models["start"] if case.old else policy).logprobs(raw).detach()
        rewards[i] = -KL_COEF * _ESTIMATES[kind](old - models["reference"].logprobs(raw).detach())
        rewards[i][-1] += raw["reward"]
        samples[i] = {**raw, "old": torch.zeros(len(raw["token_ids"]), dtype=torch.float64)}
        samples[i]["old"][raw["response_mask"]] = old.double()
    for i, values in (_grpo if estimator == "grpo" else _reinforce)(rewards).items():
        samples[i]["advantages"] = torch.zeros_like(samples[i]["old"])
        samples[i]["advantages"][samples[i]["response_mask"]] = values.double()
        if i == TRUNCATED:
            samples[i]["response_mask"] = torch.zeros_like(samples[i]["response_mask"])
    return samples


def round_gradients(
    case: GradientCase, policy: Plain, models: dict[str, Plain], rollouts: list[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """With the KL in the reward: the gradient of each optimizer step of a round, two groups a step or all in one."""
    samples = _penalised(case, policy, models, rollouts)
    steps = ((0, 1), (2, 3)) if case.old else ((0, 1, 2, 3),)
    return [gradient(case, policy, [raw for i, raw in samples.items() if GROUPS[i] in groups]) for groups in steps]


def gradient(case: GradientCase, plain: Plain, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the loss by parameter name; a tied weight once."""
    names, params = zip(*plain.model.named_parameters(), strict=True)
    value = loss(case, plain.logprobs, samples)
    return dict(zip(names, torch.autograd.grad(value, params, retain_graph=True), strict=True))


class Truth:
    """The gradients of the optimizer steps of any case, in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        names = ("untied", "tied", "start", "reference")
        self._models = {name: Plain(read_model(folder / name, dtype)) for name in names}
        self._samples, self._rollouts = read_samples(folder), read_rollouts(folder)
        self._known: dict[Any, list[dict[str, Tensor]]] = {}

    def __call__(self, case: GradientCase) -> list[dict[str, Tensor]]:
        if case.truth not in self._known:
            model = self._models[case.model]
            if case.kl == "reward":
                found = round_gradients(case, model, self._models, self._rollouts)
            else:
                found = [gradient(case, model, self._samples[:FEW] if case.few else self._samples)]
            self._known[case.truth] = found
        return self._known[case.truth]


def error_of(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    """The largest relative error of an optimizer step."""
    return max(relative_error(a, b) for a, b in zip(found, wanted, strict=True))


def relative_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """|found - truth| / |truth| over all parameters together."""
    assert found.keys() == truth.keys()
    difference = torch.cat([(found[k].double() - truth[k]).flatten() for k in truth])
    return float(difference.norm() / torch.cat([truth[k].flatten() for k in truth]).norm())
