"""The trainer's own parts as the workers use them: a policy, a plan, one round of two optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_grad
from torch import Tensor

from grpo_ds.actor import backend
from grpo_ds.actor.ds_json import actor_config, load_ds_json, reference_config
from grpo_ds.actor.policy import Policy, Scorer
from grpo_ds.batching import SampleSize, UpdatePlan, collate, plan_updates
from grpo_ds.config import ActorConfig, ImportanceConfig, LoraConfig, ModelConfig
from grpo_ds.dist import Ranks
from grpo_ds.lora import add_adapters
from grpo_ds.losses import get_policy_loss
from grpo_ds.objective import Objective
from grpo_ds.shards import PREFIX
from tests.dist import cases
from tests.dist.cases import GROUPS, KL_COEF, MAX_RESPONSE_TOKENS, TEMPERATURE, GradientCase

Raw = list[dict[str, Tensor]]

STILL = ActorConfig(lr=0.0, grad_clip=0.0)
"""An optimizer whose step only clears the gradients."""
MOVING = ActorConfig(
    lr=0.01, lr_warmup_steps=2, adam_eps=1e-3, betas=(0.9, 0.99), weight_decay=0.1, grad_clip=0.05, clip_ratio_high=0.28
)
"""An optimizer of which every option matters; a large eps keeps rounding noise out of small gradients' updates."""


def json_of(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed file, or a variant of one."""
    if name == "partitioned":
        # Under the shipped threshold a model this small would stay whole on every rank.
        config = load_ds_json("zero3.json", [], "test")
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config
    if name.startswith("stage"):
        return {"zero_optimization": {"stage": int(name.removeprefix("stage")), "overlap_comm": False}}
    return load_ds_json(name, [], "test")


def model_config(path: Path, dtype: str) -> ModelConfig:
    return ModelConfig(path=str(path), dtype=dtype, attn_implementation="sdpa")  # type: ignore[arg-type]


def make_policy(
    folder: Path, ranks: Ranks, actor: ActorConfig, *, model: str = "untied", config: str = "partitioned",
    dtype: str = "float32", recompute: bool = False, lora: LoraConfig | None = None, universal: bool = False,
) -> Policy:  # fmt: skip
    """The trainer's own path from a model folder to a policy. universal: for checkpoints of another number of ranks."""
    full = actor_config(json_of(config), dtype=dtype, grad_clip=actor.grad_clip, world=ranks.world)
    full |= {"checkpoint": {"load_universal": True}} if universal else {}
    loaded = backend.load_model(model_config(folder / model, dtype), str(folder / model), dtype, full)
    add_adapters(loaded, lora or LoraConfig(), seed=5)
    if recompute:
        backend.recompute_activations(loaded)
    engine = backend.build_engine(loaded, full, temperature=TEMPERATURE, chunk=5, actor=actor)
    return Policy(engine, backend.device(ranks), actor, ranks.world)


def make_scorer(folder: Path, ranks: Ranks, model: str, config: str) -> Scorer:
    """The trainer's own path from a model folder to a frozen reference."""
    full = reference_config(json_of(config), dtype="float32", world=ranks.world)
    loaded = backend.load_model(model_config(folder / model, "float32"), str(folder / model), "float32", full)
    engine = backend.build_engine(loaded, full, temperature=TEMPERATURE, chunk=5, actor=None)
    return Scorer(engine, backend.device(ranks))


def actor_of(case: GradientCase) -> ActorConfig:
    """The recipe's section `actor`."""
    actor = replace(STILL, loss_agg_mode=case.mode)  # type: ignore[arg-type]
    if not case.kl:
        return replace(actor, kl_loss_coef=0.0)
    return replace(actor, kl_loss_coef=KL_COEF, kl_placement=case.kl, kl_loss_type=case.spread[1])


_policy_loss = cache(get_policy_loss)  # reading a plugin's documentation takes longer than a small batch


def make_objective(case: GradientCase) -> Objective:
    known = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    options = known if case.loss in ("vanilla", "gspo", "cispo", "gmpo") else {}
    level, mode = case.importance
    return Objective(_policy_loss(case.loss, **options), actor_of(case), ImportanceConfig(level=level, mode=mode))  # type: ignore[arg-type]


def per_token(raw: Raw, micro: Sequence[int], name: str) -> Tensor:
    return torch.cat([torch.empty(0), *(raw[i][name][raw[i]["response_mask"]] for i in micro)])


def make_plan(
    raw: Raw, groups: Sequence[int], ranks: Ranks, budget: int, layout: str, per_update: int
) -> list[UpdatePlan]:
    sizes = [
        SampleSize(group, s["token_ids"].numel(), int(s["response_mask"].sum()))
        for group, s in zip(groups, raw, strict=True)
    ]
    return plan_updates(
        sizes,
        world=ranks.world,
        budget=budget,
        layout=layout,  # type: ignore[arg-type]
        groups_per_update=per_update,
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )


def reordered(plan: UpdatePlan, seed: int) -> UpdatePlan:
    """The same micro-batches on other ranks and in another order, and the samples of each in another order.

    The plan alone sorts by length, so an order of the samples it is made from is hardly seen in it.
    """
    random = torch.Generator().manual_seed(seed)

    def shuffled(items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(items[k] for k in torch.randperm(len(items), generator=random).tolist())

    micros = shuffled([shuffled(micro) for rank in plan.micro_batches for micro in rank])
    each = len(plan.micro_batches[0])
    return replace(plan, micro_batches=tuple(micros[k : k + each] for k in range(0, len(micros), each)))


def _order(case: GradientCase) -> list[int]:
    count = cases.FEW if case.few else len(GROUPS)
    if not case.shuffle:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(case.shuffle)).tolist()


def step_gradient(
    case: GradientCase, policy: Policy, ranks: Ranks, raw: Raw
) -> tuple[list[dict[str, Tensor]], list[float], list[UpdatePlan]]:
    """One optimizer step's gradient by the trainer's parts."""
    order = _order(case)
    raw = [raw[i] for i in order]
    (plan,) = make_plan(raw, [GROUPS[i] for i in order], ranks, case.budget, case.layout, len(GROUPS))
    if case.shuffle:
        plan = reordered(plan, case.shuffle)
    objective = make_objective(case)
    for micro in plan.micro_batches[ranks.rank]:
        batch = collate([cases.as_sample(raw[i], i) for i in micro], case.layout)  # type: ignore[arg-type]
        logprobs, entropy = policy.forward(batch)
        totals = plan.totals
        if case.mistake == "local_totals":
            totals = replace(totals, tokens=max(1, logprobs.numel()), sequences=max(1, len(micro)))
        share, _ = objective(
            logprobs,
            entropy,
            batch,
            totals,
            version=0,
            old_logprobs=per_token(raw, micro, "old") if case.old else None,
            ref_logprobs=per_token(raw, micro, "ref") if case.kl else None,
            kl_coef=KL_COEF,
        )
        if case.mistake == "unscaled":
            policy.engine.backward(share, scale_wrt_gas=False)
        else:
            policy.backward(share)
    return [gradient_of(policy)], [policy.step()], [plan]


def logprobs_of(scorer: Scorer, raw: Raw, ranks: Ranks, layout: Any = "padded") -> dict[int, Tensor]:
    """{sample: log-probabilities} of the samples on this rank."""
    (plan,) = make_plan(raw, GROUPS, ranks, 64, layout, len(GROUPS))
    found: dict[int, Tensor] = {}
    for micro in plan.micro_batches[ranks.rank]:
        values = scorer.logprobs(collate([cases.as_sample(raw[i], i) for i in micro], layout))
        assert not values.requires_grad
        parts = values.split([int(raw[i]["response_mask"].sum()) for i in micro]) if micro else ()
        found |= {i: part.clone() for i, part in zip(micro, parts, strict=True)}
    return found


def gradient_of(policy: Policy) -> dict[str, Tensor]:
    """The accumulated gradient under ZeRO-3, whole, on every rank; one collective, not one a parameter."""
    named = trained(policy)
    shards = [safe_get_local_grad(p).flatten().cpu() for _, p in named]
    ranks = torch.empty(policy.world * sum(shard.numel() for shard in shards))
    deepspeed.comm.all_gather_into_tensor(ranks, torch.cat(shards))
    columns = ranks.view(policy.world, -1).split([shard.numel() for shard in shards], dim=1)
    return {
        name: column.flatten()[: p.ds_numel].view(p.ds_shape).clone()
        for (name, p), column in zip(named, columns, strict=True)
    }


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """The float32 master weights, whole, on every rank."""
    return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in trained(policy)}


def trained(policy: Policy) -> list[tuple[str, Any]]:
    """The parameters that are not frozen, with their names."""
    named = policy.engine.module.named_parameters()
    return [(name.removeprefix(PREFIX), param) for name, param in named if param.requires_grad]


def gathered(policy: Policy) -> dict[str, Tensor]:
    """The parameters as DeepSpeed itself puts them together, in the training dtype."""
    params = list(policy.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters([p for _, p in params], modifier_rank=None):
        return {name.removeprefix(PREFIX): p.detach().cpu().clone() for name, p in params}


def run_round(policy: Policy, ranks: Ranks, raw: Raw, losses: list[float] | None = None) -> list[float]:
    """Two optimizer steps; the old log-probabilities are those at the start."""
    case = GradientCase(budget=64, kl="loss")
    objective = make_objective(case)
    plans = make_plan(raw, GROUPS, ranks, case.budget, case.layout, 2)
    steps = [
        [collate([cases.as_sample(raw[i], i) for i in micro], "padded") for micro in plan.micro_batches[ranks.rank]]
        for plan in plans
    ]
    old = [[policy.logprobs(batch) for batch in step] for step in steps]
    norms = []
    for k, (plan, step) in enumerate(zip(plans, steps, strict=True)):
        for j, (micro, batch) in enumerate(zip(plan.micro_batches[ranks.rank], step, strict=True)):
            logprobs, entropy = policy.forward(batch)
            share, stats = objective(
                logprobs, entropy, batch, plan.totals, version=0, old_logprobs=old[k][j],
                ref_logprobs=per_token(raw, micro, "ref"), kl_coef=KL_COEF,
            )  # fmt: skip
            policy.backward(share)
            if losses is not None:
                losses.append(float(stats["loss"]))
        norms.append(policy.step())
    return norms
