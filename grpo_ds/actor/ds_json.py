"""ds_configs/*.json + recipe -> the dictionary DeepSpeed gets.

The JSON speaks DeepSpeed's own words about memory and communication. Numbers that the recipe owns (batch sizes,
optimizer, precision, clipping) are refused there, so that each has one place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_ds.config import RecipeError
from grpo_ds.recipe import ROOT, resolve_path

OWNED_BY_RECIPE = {
    "train_batch_size": "train.prompts_per_round and rollout.n",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "optimizer": "actor.lr, actor.betas, actor.weight_decay",
    "scheduler": "actor.lr and actor.lr_warmup_steps",
    "gradient_clipping": "actor.grad_clip",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "data_types": "model.dtype; gradients are added in float32",
    "managed_gradient_accumulation": "the trainer, which cuts every step anew",
}


def load_ds_json(name: str, bases: list[Path], key: str) -> dict[str, Any]:
    """Reads a file of ds_configs/ (or a path) and refuses what the recipe owns.

    key: the recipe key that named the file, for the message. Raises RecipeError.
    """
    path = resolve_path(name, [*bases, ROOT / "ds_configs"])
    if path is None or not path.is_file():
        have = ", ".join(sorted(p.name for p in (ROOT / "ds_configs").glob("*.json")))
        raise RecipeError(f"{key}: no file `{name}` here, beside the recipe or in ds_configs/, which has: {have}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path}: DeepSpeed's configuration is a JSON object, got {type(config).__name__}")
    for owned, place in OWNED_BY_RECIPE.items():
        if owned in config:
            raise RecipeError(f"{path}: remove `{owned}`: it is set by the recipe ({place})")
    if zero_stage(config) not in (1, 2, 3):
        # Without ZeRO, DeepSpeed reports no gradient norm, and the loop could not see a step that went wrong.
        raise RecipeError(
            f"{path}: `zero_optimization.stage` is {zero_stage(config)}: choose 1, 2 or 3 (3 partitions everything)"
        )
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lies in host memory or on disk, where DeepSpeed steps with its own Adam."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def actor_config(config: dict[str, Any], *, dtype: str, grad_clip: float, world: int) -> dict[str, Any]:
    """Completes the actor's configuration.

    The batch sizes are DeepSpeed's bookkeeping only: with managed_gradient_accumulation off, `backward` accumulates
    and `step` is the boundary, so every step may have its own number of micro-batches. Their gradients are added in
    float32 also where the weights are bfloat16: in 16 bits the sum would depend on how the step is cut. (DeepSpeed
    cannot without ZeRO, which `load_ds_json` refuses.)
    """
    return {
        **config,
        "data_types": {"grad_accum_dtype": "fp32"} if zero_stage(config) else {},
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": grad_clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def reference_config(config: dict[str, Any], *, dtype: str, world: int) -> dict[str, Any]:
    """Completes the reference's configuration (ZeRO-Inference: stage 3, no optimizer).

    Raises RecipeError for another stage: nothing would be partitioned.
    """
    if zero_stage(config) != 3:
        raise RecipeError(
            f"reference.deepspeed: ZeRO-Inference needs zero_optimization.stage 3, got {zero_stage(config)}"
        )
    return {
        **config,
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
