"""The example package, installed by pip, trains two steps with real DeepSpeed ranks and a real vLLM server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, read_jsonl, run
from tests.plugins.conftest import pip_install

__all__ = ["pip_install"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEMO = ROOT / "recipes" / "demo"
RECIPE = f"""
model: {{path: {DEMO}/model}}
data: {{train: {DEMO}/train.jsonl, max_prompt_tokens: 16}}
reward: {{functions: [arithmetic, digits_right]}}
rollout: {{n: 4, max_response_tokens: 8}}
engine: {{kind: vllm}}
algorithm: {{adv_estimator: midpoint, estimator_args: {{scale: 0.5}}, filter_groups: {{enable: false}}}}
actor: {{lr: 1.0e-4}}
train: {{prompts_per_round: 8, rounds: 2, micro_batch_tokens: 512}}
run: {{name: plugin}}
"""


def test_the_example_plugin_trains(
    pip_install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(pip_install("example_estimator")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    (tmp_path / "plugin.yaml").write_text(RECIPE)
    done = run(["--recipe", "plugin.yaml"], tmp_path, "deepspeed")
    assert done.process.returncode == 0, done.screen
    rounds = read_jsonl(done.folder / "metrics.jsonl")
    assert [(row["version"], row["samples"]) for row in rounds] == [(1, 32), (2, 32)]
    assert all(row["grad_norm"] > 0 for row in rounds)
    assert json.loads((done.folder / "summary.json").read_text())["rounds"] == 2
