"""Generation engines. Import `make_engine` from here; nothing heavy is imported before it is called."""

from __future__ import annotations

from pathlib import Path

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineSettings, GenerationEngine
from grpo_ds.engine.devices import replica_settings

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
    trust_remote_code: bool = False,
) -> GenerationEngine:
    """Make (not start) a node's engine of config.kind; with replicas or restarts it is an `EnginePool`.

    dtype: "float32" or "bfloat16". max_model_len: longest prompt + response, in tokens. device: "cpu" or "cuda".
    Raises RecipeError for an unknown kind and for settings the engine cannot take.
    """
    if config.sleep and config.kind == "hf":
        raise RecipeError(
            "engine.sleep means nothing to engine.kind hf, which lives in the trainer's process: remove it"
        )
    settings = EngineSettings(
        model_path, dtype, max_model_len, log_dir, device, seed, trust_remote_code=trust_remote_code
    )
    if config.replicas == 1 and config.max_restarts == 0:
        return _make_one(config, settings)
    _check_pool(config)
    from grpo_ds.engine.pool import EnginePool

    return EnginePool(lambda k: _make_one(config, replica_settings(config, settings, k)), config)


def _check_pool(config: EngineConfig) -> None:
    keys = "engine.replicas and engine.max_restarts"
    if config.kind == "hf":
        raise RecipeError(f"{keys} mean nothing to engine.kind hf, which has no server: remove them")
    if config.urls:
        raise RecipeError(
            f"{keys} are for servers that the run starts, and engine.urls names others: remove one of them"
        )
    if config.replicas > 1 and "port" in config.args:
        raise RecipeError(f"engine.args.port is one port for engine.replicas {config.replicas} servers: remove it")


def _make_one(config: EngineConfig, settings: EngineSettings) -> GenerationEngine:
    if config.kind == "vllm":
        from grpo_ds.engine.vllm import VllmEngine

        return VllmEngine(config, settings)
    if config.kind == "sglang":
        from grpo_ds.engine.sglang import SglangEngine

        return SglangEngine(config, settings)
    if config.kind == "hf":
        from grpo_ds.engine.hf import HfEngine

        return HfEngine(config, settings)
    raise RecipeError(f"engine.kind is {config.kind!r}, which does not exist: choose one of {', '.join(KINDS)}")
