"""The vLLM engine: a server spoken to over HTTP. Imports neither vLLM nor torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import EngineSettings, RawRollout, Request, SamplingSpec
from grpo_ds.engine.process import server_env
from grpo_ds.engine.server import ServerEngine
from grpo_ds.engine.servers import ServerKind
from grpo_ds.engine.vllm_wire import generate_body, parse_response, server_args


class VllmEngine(ServerEngine):
    """Starts (or, with settings.url, joins) a vLLM server; implements `ServerLike`."""

    kind = ServerKind("vLLM", "grpo_ds.engine.serve", ("/update_weights", "/collective_rpc"), "/weight_info")
    generate_path = "/inference/v1/generate"

    def __init__(self, config: EngineConfig, settings: EngineSettings) -> None:
        """Raises RecipeError for settings the server cannot take, and as `ServerEngine` does."""
        args = server_args(config, settings)
        super().__init__(config, settings, config.python or sys.executable, args, server_environment(settings.device))

    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        return [generate_body(request, spec)]

    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        return parse_response(answer, request, spec)

    def _abort(self, timeout_s: float) -> None:
        self._server.post("/abort_requests", {}, timeout_s)

    def _version_text(self) -> str:
        return str(self._server.ask_for(self.kind.core_path, "weight_version"))

    def _on_ready(self) -> None:
        # vLLM calls the weights it loaded itself "default"; they are the run's policy version 0.
        self._server.post("/update_weight_version", {"new_version": "0"})

    def _noise(self, line: str) -> bool:
        return "] Route: " in line

    # ---- weight updates ----

    def _pause(self) -> None:
        self._server.post("/pause?mode=keep")

    def begin_update(self, names: Sequence[str]) -> None:
        self._server.post("/collective_rpc", {"method": "abandon_weight_update"})
        self._server.post("/init_weight_transfer_engine", {"init_info": {"names": list(names)}})
        self._server.post("/start_weight_update")

    def _workers(self) -> int:
        return int(self._server.ask_for("/get_world_size", "world_size"))

    def _load(self, bucket: dict[str, Any]) -> None:
        self._server.post("/update_weights", {"update_info": bucket})

    def finish_update(self, version: int) -> None:
        self._server.post("/finish_weight_update", {"weight_version": str(version)})

    def flush_cache(self) -> None:
        answer = self._server.post("/reset_prefix_cache?reset_running_requests=true")
        if answer.json().get("success") is not True:
            raise self._error(f"{self.url} could not forget its key/value cache: {answer.text[:2000]}")

    def _resume(self) -> None:
        self._server.post("/resume")

    # ---- memory ----

    def _sleep(self) -> None:
        # Level 2 drops the weights: what generates next are the ones of the publication that must come before.
        self._server.post("/sleep?level=2&mode=wait")

    def _wake(self, tag: str) -> None:
        self._server.post(f"/wake_up?tags={tag}")


def server_environment(device: str) -> dict[str, str]:
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if device == "cpu":
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # lets the engine process run the model itself
        # Its sampling helpers would be built with g++ by every server anew, during the first generation.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    return server_env(device, defaults)
