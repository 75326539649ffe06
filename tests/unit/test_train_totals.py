"""What a checkpoint says of an adaptive KL coefficient, however often the run is started again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_ds.actor import checkpoint
from grpo_ds.actor.checkpoint import TrainerState
from grpo_ds.build import fresh_state
from grpo_ds.losses import KlController
from grpo_ds.recipe import read_recipe
from grpo_ds.train import Run


def start(state: TrainerState, kl_target: float | None) -> Run:
    """A run that has come as far as its first round; the recipe's coefficient is 0.01."""
    run: Any = Run()
    recipe, _ = read_recipe(["--recipe", "quickstart.yaml"])
    run.recipe = replace(recipe, actor=replace(recipe.actor, kl_loss_coef=0.01, kl_target=kl_target))
    run.kl = KlController(0.01, kl_target, 1000)
    run.state, run.checkpoint, run.engine, run.folder = state, Path("c") if state.round else None, None, Path("run")
    run.ranks = SimpleNamespace(world=1, leads_node=False, barrier=lambda what: None)
    run.policy = SimpleNamespace(engine=None, steps_taken=0)
    run.collector = SimpleNamespace(cursor=0, carried=[], unfinished=list)
    run.publisher = SimpleNamespace(publish=lambda version: None)
    run.log = SimpleNamespace(say=lambda text: None)
    run._resume_or_begin()
    return run


@pytest.fixture(autouse=True)
def saved(monkeypatch: pytest.MonkeyPatch) -> list[TrainerState]:
    states: list[TrainerState] = []
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: [])
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda folder, engine, state, *_: states.append(state))
    return states


def test_a_coefficient_outlives_starts_that_end_before_a_round_does(saved: list[TrainerState]) -> None:
    """As when each start finds too few groups for a round (Exhausted), and saves those."""
    run = start(fresh_state(1, {}), kl_target=0.1)
    run.kl.coef, run.done = 0.05, 1
    run._save()
    for _ in range(3):
        run = start(saved[-1], kl_target=0.1)
        assert run.kl.coef == 0.05
        run._save()


def test_a_coefficient_of_an_earlier_target_is_forgotten_with_it(saved: list[TrainerState]) -> None:
    adapted = fresh_state(1, {})
    start(replace(adapted, round=1, totals=adapted.totals | {"kl_coef": 0.05}), kl_target=None)._save()
    assert "kl_coef" not in saved[-1].totals
    assert start(saved[-1], kl_target=0.1).kl.coef == 0.01
