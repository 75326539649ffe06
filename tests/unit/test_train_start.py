"""Engine and trainer on the same accelerator do not start at the same time; on CPUs they do, because imports take long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from grpo_ds.actor import backend
from grpo_ds.actor.ds_json import load_ds_json
from grpo_ds.recipe import read_recipe
from grpo_ds.train import Run


class Loaded(Exception):
    """The trainer would have taken memory of its device."""


@pytest.mark.parametrize(
    ("device", "options", "order"),
    [
        ("cuda", [], ["engine is up", "all ranks know", "model"]),
        ("cpu", [], ["model"]),
        ("cuda", ["--engine.kind", "hf"], ["model"]),
        ("cuda", ["--engine.urls", '["http://127.0.0.1:1"]'], ["model"]),
    ],
)
def test_the_model_is_loaded_when_the_engine_has_taken_its_memory(
    device: str, options: list[str], order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def load(*_: Any) -> None:
        done.append("model")
        raise Loaded

    monkeypatch.setattr(backend, "device_kind", lambda: device)
    monkeypatch.setattr(backend, "device", lambda ranks: None)
    monkeypatch.setattr(backend, "load_model", load)
    run: Any = Run()
    run.recipe, _ = read_recipe(["--recipe", "quickstart.yaml", *options])
    run.ranks = SimpleNamespace(world=1, barrier=lambda what: done.append("all ranks know"))
    run.engine = SimpleNamespace(wait_ready=lambda: done.append("engine is up"))
    run.actor_json, run.state = load_ds_json("zero3.json", [], "actor.deepspeed"), SimpleNamespace(world=1)
    run.dtype, run.model_path = "float32", "model"
    with pytest.raises(Loaded):
        run._build_models()
    assert done == order
