"""What a model cannot do is refused from its config.json, before weights are read or an engine starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, OpenAIGPTConfig, PhiConfig, Qwen3Config, ViTConfig

from grpo_ds.build import check_models
from grpo_ds.config import RecipeError
from grpo_ds.recipe import read_recipe

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def check(path: Path, *options: str) -> None:
    recipe, bases = read_recipe(["--recipe", "quickstart", "--model.path", str(path), *options])
    check_models(recipe, str(path), bases)


def written(path: Path, config: Any = Qwen3Config, **other: Any) -> Path:
    """A folder with config.json, and no weights."""
    config(**SIZES, **other).save_pretrained(path)
    return path


def refusal(path: Path, *options: str) -> str:
    with pytest.raises(RecipeError) as error:
        check(path, *options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_that_can_do_all_passes_without_its_weights(tmp_path: Path) -> None:
    check(written(tmp_path), "--model.gradient_checkpointing", "true", "--model.lora.rank", "2")
    check(tmp_path, "--model.attn_implementation", "eager")


def test_an_attention_kernel_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    said = refusal(written(tmp_path), "--model.attn_implementation", "sdpaa")
    assert said.startswith("model.attn_implementation: sdpaa cannot be used here (Specified `attn_implementation=")
    assert said.endswith("): choose sdpa or eager, or install the package that it needs")


def test_an_attention_kernel_whose_package_is_missing_is_refused(tmp_path: Path) -> None:
    said = refusal(written(tmp_path), "--model.attn_implementation", "flash_attention_2")
    assert said.startswith("model.attn_implementation: flash_attention_2 cannot be used here (FlashAttention2 ")


@pytest.mark.parametrize(
    ("config", "reason"),
    [(Gemma2Config, "Gemma2ForCausalLM has final_logit_softcapping"), (PhiConfig, "PhiForCausalLM has a bias")],
)
def test_a_head_that_is_more_than_a_product_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    assert refusal(written(tmp_path, config)).startswith(
        f"model.path: {tmp_path}: the head of {reason}, which the trainer"
    )


def test_recomputation_without_known_layers_is_refused_only_where_it_is_on(tmp_path: Path) -> None:
    eager = ("--model.attn_implementation", "eager")
    check(written(tmp_path, OpenAIGPTConfig), *eager)
    said = refusal(tmp_path, *eager, "--model.gradient_checkpointing", "true")
    assert said.startswith(
        "model.gradient_checkpointing: OpenAIGPTLMHeadModel does not say what its decoder layers are"
    )


def test_adapters_that_do_not_fit_are_refused_only_where_there_are_any(tmp_path: Path) -> None:
    check(written(tmp_path), "--model.lora.targets", "[c_attn]")
    said = refusal(tmp_path, "--model.lora.targets", "[c_attn]", "--model.lora.rank", "1")
    assert "no linear layer named c_attn: choose from down_proj, " in said


def test_a_model_of_another_kind_is_refused_as_such(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    assert refusal(tmp_path).startswith("model.path: transformers can build no causal language model from ")
    assert refusal(tmp_path / "nothing").startswith("model.path: transformers can build no causal language model from ")


def test_a_reference_of_its_own_is_checked_where_there_is_one(tmp_path: Path) -> None:
    own = ("--reference.path", str(written(tmp_path / "reference", PhiConfig)))
    check(written(tmp_path / "policy"), *own, "--actor.kl_loss_coef", "0")
    said = refusal(tmp_path / "policy", *own, "--actor.kl_loss_coef", "0.1")
    assert said.startswith(f"reference.path: {tmp_path / 'reference'}: the head of PhiForCausalLM has a bias")
