"""Every recipe of the demo, and DAPO's, trains for three rounds, as a user starts it, with the in-process engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, read_jsonl, run
from tests.e2e_plugins.dapo import ON_THE_DEMO, check_dapo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DEMOS = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if "path: demo/model" in path.read_text())


def test_the_demo_recipes_are_found() -> None:
    assert set(DEMOS) >= {"quickstart", "dr_grpo", "rloo", "reinforce_pp", "remax", "gspo"}


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_recipe_trains_three_rounds(name: str, tmp_path: Path) -> None:
    short = ["--train.rounds", "3", "--train.prompts_per_round", "16", "--data.heldout", "null"]
    update = ["--train.prompts_per_update", "8"] if name == "gspo" else []
    done = run(["--recipe", name, "--engine.kind", "hf", *short, *update], tmp_path)
    assert done.process.returncode == 0, done.screen
    rounds = read_jsonl(done.folder / "metrics.jsonl")
    assert [row["round"] for row in rounds] == [0, 1, 2]
    assert all(0 < row["grad_norm"] < float("inf") for row in rounds)
    assert all(row["samples"] == 16 * 8 for row in rounds), "a greedy response is not trained on"
    if name == "remax":
        for row in rounds:  # greedy responses count in the cost, and nowhere else
            assert row["tokens_generated"] == row["tokens_trained"] + row["baseline_tokens"]
            assert row["baseline_tokens"] > 0


def test_dapo_with_all_its_parts_trains_three_rounds_on_the_demo(tmp_path: Path) -> None:
    check_dapo(run([*ON_THE_DEMO, "--train.rounds", "3"], tmp_path), rounds=3)
