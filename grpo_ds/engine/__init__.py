"""Generation engines. Import `make_engine` from here; nothing heavy is imported before it is called."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_ds.config import EngineConfig
    from grpo_ds.engine.base import GenerationEngine

KINDS = ("vllm", "sglang", "hf")


def make_engine(
    config: EngineConfig,
    *,
    model_path: str,
    dtype: str,
    max_model_len: int,
    log_dir: Path,
    device: str,
    seed: int,
) -> GenerationEngine:
    """Make (not start) a node's engine of config.kind; with replicas or restarts it is an `EnginePool`.

    dtype: "float32" or "bfloat16". max_model_len: longest prompt + response, in tokens. device: "cpu" or "cuda".
    Raises RecipeError for an unknown kind and for settings the engine cannot take.
    """
    make = partial(
        _make_one, config, model_path=model_path, dtype=dtype, max_model_len=max_model_len, device=device, seed=seed
    )
    if config.replicas == 1 and config.max_restarts == 0:
        return make(log_dir)
    _check_pool(config)
    from grpo_ds.engine.pool import EnginePool

    return EnginePool(lambda k: make(log_dir / f"replica-{k}" if config.replicas > 1 else log_dir), config)


def _check_pool(config: EngineConfig) -> None:
    from grpo_ds.config import RecipeError

    keys = "engine.replicas and engine.max_restarts"
    if config.kind == "hf":
        raise RecipeError(f"{keys} mean nothing to engine.kind hf, which has no server: remove them")
    if config.urls:
        raise RecipeError(
            f"{keys} are for servers that the run starts, and engine.urls names others: remove one of them"
        )
    if config.replicas > 1 and "port" in config.args:
        raise RecipeError(f"engine.args.port is one port for engine.replicas {config.replicas} servers: remove it")


def _make_one(
    config: EngineConfig, log_dir: Path, *, model_path: str, dtype: str, max_model_len: int, device: str, seed: int
) -> GenerationEngine:
    if config.kind == "vllm":
        from grpo_ds.engine.vllm import VllmEngine

        return VllmEngine(config, model_path, dtype, max_model_len, log_dir, device, seed)
    if config.kind == "sglang":
        from grpo_ds.engine.sglang import SglangEngine

        return SglangEngine(config, model_path, dtype, max_model_len, log_dir, device, seed)
    if config.kind == "hf":
        from grpo_ds.engine.hf import HfEngine

        return HfEngine(config, model_path, dtype, max_model_len, device)
    from grpo_ds.config import RecipeError

    raise RecipeError(f"engine.kind is {config.kind!r}, which does not exist: choose one of {', '.join(KINDS)}")
