"""LoRA as a user runs it: two ranks, an engine that gets merged weights, a folder for transformers and one for PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.e2e.harness import ROOT, read_jsonl, run

ROUNDS = 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_lora_recipe_learns_on_two_ranks_and_vllm_and_leaves_both_folders(tmp_path: Path) -> None:
    options = ["--train.rounds", str(ROUNDS), "--sync.parity_every", str(ROUNDS), "--sync.verify", "full"]
    options += ["--actor.lr_warmup_steps", "0"]
    done = run(["--recipe", "lora", *options], tmp_path, "deepspeed")
    assert done.process.returncode == 0, done.screen
    rounds = read_jsonl(done.folder / "metrics.jsonl")
    assert all(row["logprob_gap"] < 1e-4 for row in rounds), "the engine has what the trainer computes with"
    assert rounds[-1]["parity/max"] < 1e-3
    assert abs(rounds[0]["kl"]) < 1e-6 < 1e-4 < rounds[-1]["kl"], "the reference is the policy without adapters"
    summary = json.loads((done.folder / "summary.json").read_text())
    assert summary["heldout_after"] > summary["heldout_before"] + 0.15
    assert re.search(rf"adapter +{re.escape(str(done.folder / 'adapter'))}", done.screen)

    base, merged = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (ROOT / "recipes" / "demo" / "model", done.folder / "hf")
    )
    settings = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys() and len(adapter) == 2 * 7 * 4
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = weight.detach().double()
        if f"{key}.lora_A.weight" in adapter:
            a, b = (adapter.pop(f"{key}.lora_{kind}.weight").double() for kind in "AB")
            wanted = wanted + settings["lora_alpha"] / settings["r"] * b @ a
        torch.testing.assert_close(merged[name].detach().double(), wanted, rtol=0, atol=1e-6)
    assert not adapter, "every adapter belongs to a weight"
