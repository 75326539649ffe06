"""The server of an engine node has the settings of the run's recipe, and says where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ds.config import Recipe, RecipeError
from grpo_ds.engine_node import command
from grpo_ds.recipe import read_recipe


def recipe(*options: str) -> Recipe:
    return read_recipe(["--recipe", "quickstart.yaml", *options])[0]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_server_agrees_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("RANK", "3")
    words, env = command(recipe("--train.seed", "7"), "/models/m", "bfloat16", "cpu")
    assert words[:3] == [sys.executable, "-m", "grpo_ds.engine.serve"]
    assert value(words, "--model") == "/models/m" and value(words, "--dtype") == "bfloat16"
    assert value(words, "--max-model-len") == "24" and value(words, "--seed") == "7"
    assert "MASTER_ADDR" not in env and "RANK" not in env, "it is no rank of the run"


def test_it_has_the_gpu_to_itself_unless_the_recipe_says_otherwise() -> None:
    words, _ = command(recipe(), "m", "bfloat16", "cuda")
    assert value(words, "--gpu-memory-utilization") == "0.9"
    words, _ = command(recipe("--engine.args", "{gpu_memory_utilization: 0.5}"), "m", "bfloat16", "cuda")
    assert value(words, "--gpu-memory-utilization") == "0.5"
    words, _ = command(recipe("--engine.kind", "sglang", "--engine.python", "/x/python"), "m", "bfloat16", "cuda")
    assert words[:3] == ["/x/python", "-m", "grpo_ds.engine.sglang_serve"]
    assert value(words, "--mem-fraction-static") == "0.9"


def test_an_engine_without_a_server_is_refused() -> None:
    with pytest.raises(RecipeError, match="engine.kind hf has no server"):
        command(recipe("--engine.kind", "hf"), "m", "float32", "cpu")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_says_where_it_is_before_it_becomes_the_server(tmp_path: Path) -> None:
    """A shell script plays the engine's python here: it prints what it was called with."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    words = [sys.executable, "-m", "grpo_ds.engine_node", "--announce", str(tmp_path / "url")]
    words += ["--recipe", "quickstart.yaml", "--engine.python", str(python)]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=280, check=True)
    url = (tmp_path / "url").read_text().strip()
    host, port = done.stdout.split()[-3], done.stdout.split()[-1]
    assert url == f"http://{host}:{port}" and host == "127.0.0.1"
    refused = subprocess.run([*words, "--engine.kind", "hf"], env=env, capture_output=True, text=True, timeout=280)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("grpo_ds.engine_node: engine.kind hf has no server")
