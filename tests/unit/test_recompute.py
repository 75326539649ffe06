"""model.gradient_checkpointing on one process; with ZeRO and several ranks: tests/dist/test_memory.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grpo_ds.actor.backend import recompute_activations
from grpo_ds.config import RecipeError
from tests.models import tiny_qwen3


def made() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    return tiny_qwen3(seed=0, tied=False, num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.5, **sizes)


def test_layers_run_again_with_the_same_gradients_and_without_dropout() -> None:
    ids = torch.arange(2, 14)[None]
    gradients = []
    for on in (False, True):
        model = made().eval()
        runs: list[int] = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        if on:
            recompute_activations(model)
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        assert len(runs) == (4 if on else 2), "two layers"
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_model_that_names_no_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="model.gradient_checkpointing: Linear does not say what its decoder layers"):
        recompute_activations(nn.Linear(1, 1))
