"""The vLLM engine: one server process of its own on loopback, spoken to over HTTP. Does not import vLLM or torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import RawRollout, Request, SamplingSpec
from grpo_ds.engine.server import ServerEngine, server_env
from grpo_ds.engine.vllm_wire import generate_body, parse_response, server_args


class VllmEngine(ServerEngine):
    """Starts (or, with engine.urls, joins) vLLM servers; implements `GenerationEngine`."""

    label = "vLLM"
    module = "grpo_ds.engine.serve"
    generate_path = "/inference/v1/generate"

    def __init__(
        self,
        config: EngineConfig,
        model_path: str,
        dtype: str,
        max_model_len: int,
        log_dir: Path,
        device: str,
        seed: int,
    ) -> None:
        """Raises RecipeError for urls that are not on loopback and for a port that is taken."""
        args = server_args(config.args, model_path, dtype, max_model_len, device, seed)
        super().__init__(config, config.python or sys.executable, args, _server_env(device), log_dir, key=None)

    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        return [generate_body(request, spec)]

    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        return parse_response(answer, request, spec)

    def _version_text(self, url: str) -> str:
        return str(self._call("GET", url, "/weight_info").json()["weight_version"])

    def _on_ready(self) -> None:
        # vLLM calls the weights it loaded itself "default"; they are the run's policy version 0.
        self._post("/update_weight_version", {"new_version": "0"})

    def _noise(self, line: str) -> bool:
        return "] Route: " in line

    # ---- weight updates ----

    def pause(self) -> None:
        self._post("/pause?mode=keep")

    def begin_update(self, names: Sequence[str]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": {"names": list(names)}})
        self._post("/start_weight_update")

    def update_bucket(self, bucket: dict[str, Any]) -> None:
        self._post("/update_weights", {"update_info": bucket})

    def finish_update(self, version: int) -> None:
        self._post("/finish_weight_update", {"weight_version": str(version)})

    def flush_cache(self) -> None:
        for url, answer in self._post("/reset_prefix_cache?reset_running_requests=true").items():
            if answer.json().get("success") is not True:
                raise self._error(f"{url} could not forget its key/value cache: {answer.text[:2000]}")

    def resume(self) -> None:
        self._post("/resume")


def _server_env(device: str) -> dict[str, str]:
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if device == "cpu":
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # lets the engine process run the model itself
    # The weight-update routes; nothing but loopback reaches them.
    return server_env({"VLLM_SERVER_DEV_MODE": "1"}, defaults)
