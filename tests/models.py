"""Random models for the tests. Sizes differ from test to test; the special tokens and the tokenizer do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

PAD, EOS = 0, 1
WORDS = 128


def random_model(config: Any, *, seed: int = 0, **sizes: Any) -> Any:
    """A model with random float32 weights; `config` is one of transformers' configuration classes, `sizes` its fields."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, **sizes))


def tiny_qwen3(*, seed: int, tied: bool, **sizes: Any) -> Any:
    """A Qwen3 of 2 layers; the wide initialisation makes its weights matter and keeps greedy choices away from ties."""
    return random_model(
        Qwen3Config, seed=seed, num_hidden_layers=2, tie_word_embeddings=tied, initializer_range=0.2, **sizes
    )


def save_model(model: Any, path: Path) -> str:
    """Writes the model, and a tokenizer of the words t0 to t127, as Hugging Face lays them out; returns the folder."""
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(WORDS)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{EOS}", pad_token=f"t{PAD}").save_pretrained(path)
    return str(path)
