"""The example package is installed by pip and works like a built-in: listed, documented, checked, chosen by a recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CHECK = """
import sys
from grpo_ds.cli import main
sys.exit(main(sys.argv[1:]))
"""
CHOOSE = """
import sys, torch
from grpo_ds.build import build_estimator
from grpo_ds.recipe import read_recipe
recipe, _ = read_recipe(sys.argv[1:])
estimator, needs = build_estimator(recipe)
print(needs["min_group_size"], estimator(torch.tensor([[1.0], [5.0]]), torch.ones(2, 1), torch.tensor([0, 0]))[0].tolist())
"""
TORCH_FREE = """
import sys
from grpo_ds.rewards.resolve import resolve
print(resolve("digits_right", [])(completions=["13", "7"], answer=["14", 7]), "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def python(pip_install: Callable[..., Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a process that has the example installed."""
    paths = [str(pip_install("example_estimator")), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=200, env=env
        )

    return run


Python = Callable[..., subprocess.CompletedProcess[str]]


def test_it_is_listed_with_its_distribution_needs_and_documented_options(python: Python) -> None:
    done = python(CHECK, "plugins", "estimators")
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout.partition("  midpoint  [example-estimator 1.0]")[2]
    assert "needs: min_group_size 2" in text
    assert "scale: float (default 1.0)  Factor on every advantage." in text


def test_it_passes_the_conformance_kit(python: Python) -> None:
    done = python(CHECK, "check-estimator", "midpoint", "--option", "scale=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("midpoint: all hold\n")


def test_a_recipe_chooses_it_and_its_options_take_effect(python: Python) -> None:
    arguments = ["--recipe", "quickstart", "--algorithm.adv_estimator", "midpoint"]
    done = python(CHOOSE, *arguments, "--algorithm.estimator_args.scale=0.5")
    assert done.stdout.endswith("2 [[-1.0], [1.0]]\n"), done.stderr
    wrong = python(CHOOSE, *arguments, "--algorithm.estimator_args.sclae=0.5")
    assert (
        "estimator 'midpoint' from example-estimator 1.0 has no option 'sclae', did you mean 'scale'?" in wrong.stderr
    )


def test_its_reward_is_found_by_name_without_torch(python: Python) -> None:
    assert python(TORCH_FREE).stdout == "[0.5, 1.0] False\n"
