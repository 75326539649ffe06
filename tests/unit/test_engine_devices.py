"""Which GPUs a replica gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineSettings
from grpo_ds.engine.devices import ranks_of, replica_settings, share

CUDA = EngineSettings("m", "bfloat16", 64, Path("logs"), "cuda", 0)


def test_replicas_divide_the_nodes_gpus_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5, 6,7,0,1,2,3")
    config = EngineConfig(replicas=4, args={"tensor-parallel-size": 2})
    made = [replica_settings(config, CUDA, k) for k in range(4)]
    assert [settings.visible_devices for settings in made] == ["4,5", "6,7", "0,1", "2,3"]
    assert [settings.log_dir for settings in made] == [Path(f"logs/replica-{k}") for k in range(4)]


def test_one_engine_and_engines_without_gpus_are_left_as_they_are() -> None:
    assert replica_settings(EngineConfig(), CUDA, 0) == CUDA
    cpu = EngineSettings("m", "float32", 64, Path("logs"), "cpu", 0)
    assert replica_settings(EngineConfig(replicas=2), cpu, 1).visible_devices is None


def test_too_few_gpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        RecipeError, match=r"replicas 2 with 2 GPUs each need 4 GPUs, and this node offers 3 \(0, 1, 2\)"
    ):
        share(["0", "1", "2"], 0, 2, 2)
    with pytest.raises(RecipeError, match="offers 0"):
        share([], 0, 2, 1)


@pytest.mark.parametrize(
    ("args", "ranks"),
    [
        ({}, 1),
        ({"tp_size": 4}, 4),
        ({"tensor_parallel_size": 2, "pipeline-parallel-size": 2}, 4),
        ({"tp_size": None}, 1),
    ],
)
def test_the_gpus_of_a_server_are_counted_under_both_engines_names(args: dict[str, int], ranks: int) -> None:
    assert ranks_of(EngineConfig(args=args)) == ranks
