"""What the ranks do with LoRA: train, publish, export, save and go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo_ds.actor import backend
from grpo_ds.actor.adapter import export_adapter
from grpo_ds.actor.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from grpo_ds.actor.export import export_model
from grpo_ds.actor.policy import Policy, WithoutAdapters
from grpo_ds.config import LoraConfig, SyncConfig
from grpo_ds.dist import Ranks
from grpo_ds.sync.publish import WeightPublisher
from tests.dist import cases
from tests.dist.cases import GradientCase
from tests.dist.parts import MOVING, STILL, logprobs_of, make_policy, model_config, run_round, step_gradient
from tests.dist.parts import trained, weights_of
from tests.dist.publication import NoTokenizer, Receiver

LORA = LoraConfig(rank=3, alpha=6.0, targets=["q_proj", "v_proj", "o_proj", "down_proj"])
QUICK = replace(MOVING, lr=0.005, lr_warmup_steps=0, weight_decay=0.0, grad_clip=1.0)
"""Moves the adapters far enough in two steps to be seen, and not so far that ratios leave the range of the oracle."""
KINDS = {"partitioned": "untied", "zero3.json": "tied", "stage1": "tied", "stage2": "untied"}
"""DeepSpeed's configuration -> model."""
CUTS = [GradientCase(budget=budget, shuffle=shuffle, kl="loss") for budget, shuffle in ((cases.TIGHT, 0), (64, 7))]


def _policy(folder: Path, ranks: Ranks, config: str, **other: Any) -> Policy:
    return make_policy(folder, ranks, QUICK, model=KINDS[config], config=config, lora=LORA, **other)


def train(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """{configuration: what came out}: a publication, two optimizer steps, a publication, the two exports."""
    raw = cases.read_samples(folder)
    return {config: _train(folder, ranks, config, raw) for config in (KINDS if ranks.world == 2 else ["partitioned"])}


def _train(folder: Path, ranks: Ranks, config: str, raw: list[dict[str, Tensor]]) -> dict[str, Any]:
    policy = _policy(folder, ranks, config)
    module, base = policy.engine.module, folder / KINDS[config]
    receiver = Receiver() if ranks.leads_node else None
    settings = SyncConfig(bucket_mb=0, verify="full", timeout_s=120)
    publisher = WeightPublisher(module, ranks, receiver, settings)  # type: ignore[arg-type]
    publisher.publish(1)
    first = receiver.tensors if receiver else {}
    norms = run_round(policy, ranks, raw)
    publisher.publish(2)
    publisher.close()
    target = folder / f"lora-{ranks.world}-{config}"
    export_model(
        target / "hf",
        publisher.shards,
        ranks,
        config=module.model.config,
        generation_config=module.model.generation_config,
        tokenizer=NoTokenizer(),
    )
    model = replace(model_config(base, "float32"), lora=LORA)
    export_adapter(target / "adapter", module, model, str(base), ranks)
    reference = WithoutAdapters(policy.engine, policy.device)
    logprobs = {"off": logprobs_of(reference, raw, ranks), "on": logprobs_of(policy, raw, ranks)}
    found: dict[str, Any] = {"first": first, "second": receiver.tensors if receiver else {}, "norms": norms}
    found |= {"logprobs": logprobs, "names": [name for name, _ in trained(policy)], "weights": weights_of(policy)}
    found["frozen gradients"] = sum(p.grad is not None for p in module.parameters() if not p.requires_grad)
    optimizer = policy.engine.optimizer
    held = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
    found["masters"] = sum(flat.numel() for flat in held)
    if config == "partitioned":
        policy.actor = STILL
        found["gradients"] = [step_gradient(case, policy, ranks, raw)[0] for case in CUTS]
        policy.actor = QUICK
    if ranks.world == 2:
        state = TrainerState(1, 1, 0, policy.steps_taken, ranks.world, {}, {})
        save_checkpoint(target, policy.engine, state, None, ranks, keep=1)
        found["later"] = _later(policy, ranks, raw)
    return found


def _later(policy: Policy, ranks: Ranks, raw: list[dict[str, Tensor]]) -> dict[str, Any]:
    losses: list[float] = []
    run_round(policy, ranks, raw, losses)
    return {"losses": losses, "weights": weights_of(policy)}


def _resume(folder: Path, ranks: Ranks, config: str, **other: Any) -> dict[str, Any]:
    policy = _policy(folder, ranks, config, **other)
    fresh = weights_of(policy)
    load_checkpoint(folder / f"lora-2-{config}" / "checkpoints" / "round-000001", policy.engine, ranks)
    policy.steps_taken = 2
    return {"fresh": fresh, "loaded": weights_of(policy), **_later(policy, ranks, cases.read_samples(folder))}


def resume(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """{configuration: the steps after the checkpoint, in new processes}."""
    return {config: _resume(folder, ranks, config) for config in KINDS}


def one_rank_goes_on(folder: Path) -> dict[str, Any]:
    """The same with another number of ranks."""
    ranks = Ranks(240.0)
    backend.connect(ranks)
    found = {config: _resume(folder, ranks, config, universal=True) for config in KINDS}
    ranks.close()
    return found
