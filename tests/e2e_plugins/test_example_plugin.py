"""The example package, installed by pip, trains: in the published DAPO recipe, and with ranks and a real vLLM server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import read_jsonl, run
from tests.e2e_plugins.dapo import DEMO, ON_THE_DEMO, check_dapo
from tests.plugins.conftest import pip_install

__all__ = ["pip_install"]
pytestmark = pytest.mark.timeout(900)
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


@pytest.fixture
def example(pip_install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that a test starts have the package installed."""
    paths = [str(pip_install("example_estimator")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def test_the_example_plugin_trains_in_the_published_dapo_recipe(example: None, tmp_path: Path) -> None:
    mine = ["--reward.functions", "[arithmetic, digits_right]", "--reward.weights", "[2.0, 0.0]"]
    mine += ["--algorithm.adv_estimator", "midpoint", "--algorithm.estimator_args.scale", "0.5"]
    rollouts = check_dapo(run([*ON_THE_DEMO, *mine, "--train.rounds", "2"], tmp_path), rounds=2)
    assert any(0 < line["rewards"]["digits_right"] < 1 for line in rollouts), "the package's own reward"


@pytest.mark.slow
def test_the_example_plugin_trains(example: None, tmp_path: Path) -> None:
    (tmp_path / "plugin.yaml").write_text(RECIPE)
    done = run(["--recipe", "plugin.yaml"], tmp_path, "deepspeed")
    assert done.process.returncode == 0, done.screen
    rounds = read_jsonl(done.folder / "metrics.jsonl")
    assert [(row["version"], row["samples"]) for row in rounds] == [(1, 32), (2, 32)]
    assert all(row["grad_norm"] > 0 for row in rounds)
    assert json.loads((done.folder / "summary.json").read_text())["rounds"] == 2
