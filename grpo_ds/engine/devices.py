"""What each of a node's servers is told: its place, its log, and its GPUs, which lie next to each other. Pure.

One node with 8 GPUs and engine.args.tensor_parallel_size 2: replica 0 has GPUs 0 and 1, ..., replica 3 has 6 and 7.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineSettings

_RANKS = ("tensor_parallel_size", "tp_size", "pipeline_parallel_size", "pp_size")


def server_count(config: EngineConfig) -> int:
    """Servers of a node."""
    return len(config.urls) or config.replicas


def replica_settings(config: EngineConfig, settings: EngineSettings, replica: int) -> EngineSettings:
    """The settings of one of the node's servers: where it runs, or a folder for its log and its GPUs where there are any."""
    if config.urls:
        return replace(settings, url=config.urls[replica])
    if config.replicas == 1:
        return settings
    visible = None
    if settings.device != "cpu":
        visible = ",".join(share(_visible(), replica, config.replicas, ranks_of(config)))
    return replace(settings, log_dir=settings.log_dir / f"replica-{replica}", visible_devices=visible)


def ranks_of(config: EngineConfig) -> int:
    """GPUs that one server computes on."""
    count = 1
    for key, value in config.args.items():
        if key.replace("-", "_") in _RANKS and value is not None:
            count *= int(value)
    return count


def share(devices: Sequence[str], replica: int, replicas: int, each: int) -> list[str]:
    """The devices of one replica; RecipeError when there are not enough for all."""
    if replicas * each > len(devices):
        raise RecipeError(
            f"engine.replicas {replicas} with {each} GPUs each need {replicas * each} GPUs, and this node offers "
            f"{len(devices)} ({', '.join(devices) or 'none'}): lower engine.replicas or engine.args.tensor_parallel_size"
        )
    return list(devices[replica * each : (replica + 1) * each])


def _visible() -> list[str]:
    """Names of the node's GPUs as CUDA_VISIBLE_DEVICES has them, else their numbers."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.accelerator.device_count())]
