"""Generation engines. Import `make_engine` from here; nothing heavy is imported before it is called."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineSettings, GenerationEngine, ServerLike
from grpo_ds.engine.devices import replica_settings
from grpo_ds.engine.key import checked_urls, shared_key

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
    update_timeout_s: float = math.inf,
) -> GenerationEngine:
    """Make (not start) a node's engine of config.kind: an `EnginePool` of its servers, or hf in this process.

    dtype: "float32" or "bfloat16". max_model_len: longest prompt + response, in tokens. device: "cpu" or "cuda".
    update_timeout_s: sync.timeout_s, after which whoever updates the weights gives up.
    Raises RecipeError for an unknown kind and for settings the engine cannot take.
    """
    if config.kind not in KINDS:
        raise RecipeError(f"engine.kind is {config.kind!r}, which does not exist: choose one of {', '.join(KINDS)}")
    settings = EngineSettings(
        model_path, dtype, max_model_len, log_dir, device, seed, trust_remote_code=trust_remote_code
    )
    if config.kind == "hf":
        _check_in_process(config)
        from grpo_ds.engine.hf import HfEngine

        return HfEngine(config, settings)
    if config.replicas > 1 and "port" in config.args:
        raise RecipeError(f"engine.args.port is one port for engine.replicas {config.replicas} servers: remove it")
    if config.urls:
        config = replace(config, urls=checked_urls(config.urls, shared_key()))
    from grpo_ds.engine.pool import EnginePool

    return EnginePool(lambda k: make_server(config, replica_settings(config, settings, k)), config, update_timeout_s)


def _check_in_process(config: EngineConfig) -> None:
    if config.sleep:
        raise RecipeError(
            "engine.sleep means nothing to engine.kind hf, which lives in the trainer's process: remove it"
        )
    if config.replicas > 1 or config.max_restarts > 0:
        raise RecipeError(
            "engine.replicas and engine.max_restarts mean nothing to engine.kind hf, which has no server: remove them"
        )


def make_server(config: EngineConfig, settings: EngineSettings) -> ServerLike:
    """Make (not start) one server of config.kind, vllm or sglang; RecipeError as `make_engine`."""
    if config.kind == "vllm":
        from grpo_ds.engine.vllm import VllmEngine

        return VllmEngine(config, settings)
    from grpo_ds.engine.sglang import SglangEngine

    return SglangEngine(config, settings)
