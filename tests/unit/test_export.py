"""An export that is killed half-way never looks like a model; on real ranks: tests/dist/test_models.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from grpo_ds.actor.export import export_model
from grpo_ds.shards import list_shards
from tests.models import tiny_qwen3

ONE_RANK: Any = SimpleNamespace(rank=0, is_main=True, barrier=lambda what: None)
TOKENIZER = SimpleNamespace(save_pretrained=lambda folder: None)


def test_a_killed_export_leaves_no_folder_of_its_name_and_the_next_one_is_whole(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    model = tiny_qwen3(seed=0, tied=False, num_attention_heads=2, num_key_value_heads=1, **sizes)
    # Published models have settings like these, which transformers refuses to save.
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    parts = {"config": model.config, "generation_config": model.generation_config, "tokenizer": TOKENIZER}
    shards = list_shards(model, 1)
    killed: Any = SimpleNamespace(**vars(ONE_RANK) | {"rank": "the process ends here"})
    with pytest.raises(TypeError):
        export_model(tmp_path / "hf", shards, killed, **parts)
    assert [path.name for path in tmp_path.iterdir()] == ["hf.partial"]

    assert export_model(tmp_path / "hf", shards, ONE_RANK, **parts) == tmp_path / "hf"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(written[shard.name].equal(shard.param) for shard in shards)
    again = [replace(shard, name=f"{shard.name}.2") for shard in shards]
    export_model(tmp_path / "hf", again, ONE_RANK, **parts)
    assert set(load_file(tmp_path / "hf" / "model.safetensors")) == {shard.name for shard in again}
    assert '"temperature": 0.6' in (tmp_path / "hf" / "generation_config.json").read_text()
