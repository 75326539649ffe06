"""The trained adapters as a folder in PEFT's format, which `PeftModel.from_pretrained` and engines load onto the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from grpo_ds.config import ModelConfig
from grpo_ds.dist import Ranks
from grpo_ds.lora import adapters_of
from grpo_ds.shards import PREFIX, whole


def export_adapter(folder: Path, module: nn.Module, model: ModelConfig, base: str, ranks: Ranks) -> Path:
    """Writes adapter_model.safetensors (in the training dtype) and adapter_config.json. Called by every rank.

    base: folder or hub name of the model that was trained. The main rank holds all adapters in host memory, about 0.3 %
    of the model at rank 16.
    """
    tensors = {}
    for name, layer in adapters_of(module).items():
        with whole(layer.lora_A, layer.lora_B) as pair:
            if ranks.is_main:
                key = f"base_model.model.{name.removeprefix(PREFIX)}"
                for kind, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
                    tensors[f"{key}.{kind}.weight"] = tensor.to("cpu", copy=True).contiguous()
    if ranks.is_main:
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        lora = model.lora
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(lora.targets),
            "bias": "none",
            "inference_mode": True,
        }
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # an earlier one stays until the new one is whole
        partial.rename(folder)
    ranks.barrier("adapter written")
    return folder
