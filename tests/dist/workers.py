"""What the ranks do. Each worker runs many cases and returns all results; the tests look at one each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_ds.actor import backend
from grpo_ds.actor.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from grpo_ds.actor.policy import Policy
from grpo_ds.batching import UpdatePlan, collate
from grpo_ds.config import ActorConfig
from grpo_ds.dist import Ranks
from grpo_ds.estimators import get_estimator
from tests.dist import adapters, cases
from tests.dist.cases import GROUPS, KL_COEF, GradientCase
from tests.dist.memory import pieces, recomputation
from tests.dist.parts import (
    MOVING,
    STILL,
    Raw,
    logprobs_of,
    make_policy,
    make_scorer,
    run_round,
    step_gradient,
    weights_of,
)
from tests.dist.publication import export, sync
from tests.dist.road import Frozen, Remembered, round_gradients


def main(folder: Path) -> dict[str, Any]:
    """Everything that one process start can hold."""
    ranks = Ranks(240.0)
    backend.connect(ranks)
    sections: dict[str, Callable[[Path, Ranks], Any]] = {
        "gradients": gradients,
        "optimizer": optimizer_steps,
        "recomputation": recomputation,
        "pieces": pieces,
        "reference": reference,
        "estimators": estimators,
        "sync": sync,
        "export": export,
        "checkpoint": checkpoint_save,
        "lora": adapters.train,
    }
    results: dict[str, Any] = {}
    seconds = {}
    for name, section in sections.items():
        start = time.monotonic()
        ranks.where = name
        results[name] = section(folder, ranks)
        seconds[name] = time.monotonic() - start
    print(seconds, flush=True)
    ranks.close()
    return results


# ---- gradients ----


def all_gradients(folder: Path) -> dict[str, Any]:
    """A launch of its own for the whole product."""
    ranks = Ranks(240.0)
    backend.connect(ranks)
    results = gradients(folder, ranks, cases.product_cases())
    ranks.close()
    return results


def gradients(folder: Path, ranks: Ranks, wanted: Sequence[GradientCase] | None = None) -> dict[str, Any]:
    """{case: {"gradients": of each optimizer step, by parameter, on rank 0, "norms": ..., "micro_batches": sizes of
    [step][rank][micro-batch]}}, of the fast suite's cases unless others are named."""
    raw, rollouts = cases.read_samples(folder), cases.read_rollouts(folder)
    policies: dict[tuple[str, str], Policy] = {}
    frozen = Frozen(*(Remembered(make_scorer(folder, ranks, name, "partitioned")) for name in ("start", "reference")))
    results = {}
    for case in wanted or cases.gradient_cases(ranks.world):
        ranks.where = case.name
        key = (case.model, case.config)
        if key not in policies:
            policies[key] = make_policy(folder, ranks, STILL, model=case.model, config=case.config)
        if case.kl == "reward":
            found, norms, plans = round_gradients(case, policies[key], frozen, ranks, rollouts)
        else:
            found, norms, plans = step_gradient(case, policies[key], ranks, raw)
        sizes = [[[len(micro) for micro in rank] for rank in plan.micro_batches] for plan in plans]
        results[case.name] = {"gradients": found if ranks.is_main else [], "norms": norms, "micro_batches": sizes}
    return results


def optimizer_steps(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A round of two optimizer steps under each ZeRO stage: gradient norms and final weights."""
    raw = cases.read_samples(folder)
    configs = ["partitioned", "stage1", "stage2"] if ranks.world == 2 else ["partitioned"]
    results = {}
    for name in configs:
        policy = make_policy(folder, ranks, MOVING, config=name)
        norms = run_round(policy, ranks, raw)
        results[name] = {"norms": norms, "weights": weights_of(policy)}
    return results


# ---- reference ----


def reference(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """{(config, layout): {sample: log-probabilities}} of the samples on this rank, under ZeRO-Inference."""
    raw = cases.read_samples(folder)
    results = {}
    for name in ("zero_inference.json", "partitioned", "zero_inference_offload.json"):
        scorer = make_scorer(folder, ranks, "untied", name)
        for layout in ("padded", "packed"):
            results[f"{name}/{layout}"] = logprobs_of(scorer, raw, ranks, layout)
    return results


# ---- estimators ----


def estimator_batch() -> dict[str, Tensor]:
    """A batch of 5 groups with uneven responses; `rewards` on the last token, `parts` of two reward functions."""
    random = torch.Generator().manual_seed(3)
    groups = torch.tensor([4, 4, 4, 7, 7, 2, 2, 2, 2, 9, 9, 11])
    lengths = torch.randint(1, 8, (len(groups),), generator=random)
    mask = torch.arange(8) < lengths[:, None]
    parts = torch.randn(len(groups), 2, generator=random)
    parts[5] = 0.0
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(groups)), lengths - 1] = parts.sum(1)
    return {"rewards": rewards, "mask": mask, "groups": groups, "parts": parts}


ESTIMATORS: dict[str, dict[str, Any]] = {
    "reinforce_plus_plus": {"gamma": 0.9},
    "reinforce_plus_plus_baseline": {},
    "gdpo": {"weights": [1.0, 0.5]},
    "gpg": {},
}


def run_estimator(name: str, batch: dict[str, Tensor], all_reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(N, T) advantages."""
    needs: dict[str, Any] = {"function_rewards": batch["parts"]} if name == "gdpo" else {}
    estimator = get_estimator(name, **ESTIMATORS[name])
    advantages: Tensor = estimator(batch["rewards"], batch["mask"], batch["groups"], **needs, all_reduce=all_reduce)[0]
    return advantages


def estimators(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """{estimator/split: {"rows": indices of the batch, "advantages": (rows, T)}} of this rank."""
    batch = estimator_batch()
    labels = batch["groups"].unique()
    owner = {
        "even": torch.arange(len(labels)) % ranks.world,
        "all_on_the_last": torch.full((len(labels),), ranks.world - 1),
    }
    results = {}
    for name in ESTIMATORS:
        for split, owners in owner.items():
            mine = labels[owners == ranks.rank]
            rows = torch.isin(batch["groups"], mine).nonzero().squeeze(1)
            part = {key: value[rows] for key, value in batch.items()}
            advantages = run_estimator(name, part, partial(ranks.sum, what="estimator"))
            results[f"{name}/{split}"] = {"rows": rows, "advantages": advantages}
    return results


# ---- checkpoints ----


def _train(policy: Policy, ranks: Ranks, raw: Raw, rounds: int) -> list[float]:
    losses: list[float] = []
    for _ in range(rounds):
        run_round(policy, ranks, raw, losses)
    return losses


def checkpoint_save(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Three rounds, a checkpoint, two more rounds."""
    if ranks.world != 2:
        return {}
    raw = cases.read_samples(folder)
    policy = make_policy(folder, ranks, MOVING)
    _train(policy, ranks, raw, 3)
    state = TrainerState(3, 3, 96, policy.steps_taken, ranks.world, {}, {})
    path = save_checkpoint(folder / "run", policy.engine, state, [] if ranks.leads_node else None, ranks, keep=1)
    at_save = weights_of(policy)
    return {
        "path": str(path),
        "at_save": at_save,
        "losses": _train(policy, ranks, raw, 2),
        "weights": weights_of(policy),
    }


def resume(folder: Path) -> dict[str, Any]:
    """The same two rounds in new processes."""
    ranks = Ranks(240.0)
    backend.connect(ranks)
    raw = cases.read_samples(folder)
    policy = make_policy(folder, ranks, MOVING)
    fresh = weights_of(policy)
    load_checkpoint(folder / "run" / "checkpoints" / "round-000003", policy.engine, ranks)
    policy.steps_taken = 6
    loaded = weights_of(policy)
    losses = _train(policy, ranks, raw, 2)
    weights = weights_of(policy)
    lora = adapters.resume(folder, ranks)
    ranks.close()
    return {"lora": lora, "fresh": fresh, "loaded": loaded, "losses": losses, "weights": weights}


OTHERS = {
    "same": MOVING,
    "decay": replace(MOVING, weight_decay=0.5),
    "moments": replace(MOVING, betas=(0.5, 0.6), adam_eps=1e-2),
}
"""Optimizers under which a checkpoint of MOVING is gone on with."""


def other_options(folder: Path) -> dict[str, Any]:
    """{form of the checkpoint: {optimizer: one step from it}}"""
    ranks = Ranks(240.0)
    backend.connect(ranks)
    raw = cases.read_samples(folder)
    policy = make_policy(folder, ranks, MOVING)
    run_round(policy, ranks, raw)
    state = TrainerState(1, 1, 0, policy.steps_taken, ranks.world, {}, {})
    path = save_checkpoint(folder / "options", policy.engine, state, None, ranks, keep=1)

    def step(actor: ActorConfig, universal: bool) -> dict[str, Any]:
        resumed = make_policy(folder, ranks, actor, universal=universal)
        load_checkpoint(path, resumed.engine, ranks)
        resumed.steps_taken = state.optimizer_steps
        before = weights_of(resumed)
        step_gradient(GradientCase(), resumed, ranks, raw)
        (group,) = resumed.engine.optimizer.param_groups
        used = [*group["betas"], group["eps"], group["weight_decay"]]
        return {"before": before, "after": weights_of(resumed), "used": used}

    forms = {"own": False, "universal": True}
    found = {form: {name: step(actor, flag) for name, actor in OTHERS.items()} for form, flag in forms.items()}
    ranks.close()
    return found
