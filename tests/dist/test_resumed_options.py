"""A resumed run steps with the optimizer of its recipe, not with that of the run that wrote the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.harness import launch
from tests.dist.parts import MOVING
from tests.dist.workers import OTHERS

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def steps(folder: Path) -> dict[str, Any]:
    (found,) = launch("tests.dist.workers:other_options", 1, folder)
    return dict(found)


@pytest.mark.parametrize("form", ["own", "universal"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_option_is_the_recipes(name: str, form: str, steps: dict[str, Any]) -> None:
    actor = OTHERS[name]
    assert steps[form][name]["used"] == [*actor.betas, actor.adam_eps, actor.weight_decay]


@pytest.mark.parametrize("form", ["own", "universal"])
def test_the_step_is_the_one_of_the_recipes_options(form: str, steps: dict[str, Any]) -> None:
    """AdamW takes lr x weight_decay x w off each weight w, beside what the gradient asks for."""
    same, decay, moments = (steps[form][name] for name in OTHERS)
    off = MOVING.lr * (OTHERS["decay"].weight_decay - MOVING.weight_decay)
    for name, weight in same["before"].items():
        torch.testing.assert_close(same["after"][name] - decay["after"][name], off * weight, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(same["after"][name], moments["after"][name]) for name in same["after"])
