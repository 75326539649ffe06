"""How a recipe is named, overridden and shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grpo_ds.recipe import read_recipe
from tests.e2e.harness import ROOT, run

SHIPPED = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize(
    "named",
    [
        ["--recipe", "quickstart"],
        ["--recipe", "quickstart.yaml"],
        ["--recipe", SHIPPED],
        [f"--recipe={SHIPPED}"],
        ["--config", SHIPPED],
        ["--local_rank", "0", "--recipe", "quickstart"],
        ["--local_rank=1", "--recipe", "quickstart"],
    ],
    ids=" ".join,
)
def test_a_recipe_by_name_or_path_is_shown_with_the_options_after_it(named: list[str], tmp_path: Path) -> None:
    options = ["--actor.lr", "2e-5", "--algorithm.filter_groups.tolerance=0.25", "--reward.functions", "[math]"]
    done = run([*named, *options, "--print_config"], tmp_path)
    assert done.process.returncode == 0, done.screen
    shown = tmp_path / "shown.yaml"
    shown.write_text(done.screen)
    tree = yaml.safe_load(done.screen)
    assert tree["actor"]["lr"] == 2e-5
    assert tree["algorithm"]["filter_groups"]["tolerance"] == 0.25
    assert tree["reward"]["functions"] == ["math"]
    assert tree["train"]["prompts_per_round"] == 32, "from the recipe"
    assert tree["sync"]["bucket_mb"] == 512, "a default"
    assert read_recipe(["--recipe", str(shown)])[0] == read_recipe(["--recipe", SHIPPED, *options])[0]


def test_without_a_recipe_the_missing_keys_are_named(tmp_path: Path) -> None:
    done = run([], tmp_path)
    assert done.process.returncode == 2
    assert "model.path" in done.cause() and "name a recipe with --recipe" in done.cause()


def test_help_explains_every_section(tmp_path: Path) -> None:
    done = run(["--help"], tmp_path)
    assert done.process.returncode == 0
    for option in ("--recipe", "--model.path", "--actor.lr", "--algorithm.filter_groups.max_staleness", "--resume"):
        assert option in done.screen
    assert "Peak learning rate of AdamW" in done.screen
