"""The SGLang engine: a server spoken to over HTTP. Does not import SGLang."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineSettings, RawRollout, Request, SamplingSpec
from grpo_ds.engine.process import server_env
from grpo_ds.engine.server import ServerEngine
from grpo_ds.engine.servers import ServerKind
from grpo_ds.engine.sglang_wire import generate_bodies, parse_response, server_args, update_body


class SglangEngine(ServerEngine):
    """Starts (or, with settings.url, joins) an SGLang server; implements `ServerLike`.

    A joined server must have been started with `python -m grpo_ds.engine.sglang_serve`.
    """

    kind = ServerKind(
        "SGLang",
        "grpo_ds.engine.sglang_serve",
        ("/update_weights_from_tensor", "/init_weights_update_group", "/set_internal_state"),
        "/server_info",
    )
    generate_path = "/generate"

    def __init__(self, config: EngineConfig, settings: EngineSettings) -> None:
        """Raises RecipeError for an environment that was not made, and as `ServerEngine` does."""
        python = "" if settings.url else config.python or own_python()
        super().__init__(config, settings, python, server_args(config, settings), server_env(settings.device))
        self._max_model_len = settings.max_model_len
        self._ranks = 0

    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        return generate_bodies(request, spec, self._max_model_len)

    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        return parse_response(answer, request, spec)

    def _abort(self, timeout_s: float) -> None:
        self._server.post("/abort_request", {"abort_all": True}, timeout_s)

    def _version_text(self) -> str:
        # The web server answers the second route by itself; the first one is answered by the schedulers.
        self._server.get(self.kind.core_path)
        return str(self._server.ask_for("/model_info", "weight_version"))

    def _on_ready(self) -> None:
        """The version is on the command line."""

    def _noise(self, line: str) -> bool:
        return "server_args=" in line  # all settings, thousands of characters

    # ---- weight updates ----

    def _pause(self) -> None:
        # Requests in flight go back to the queue; their keys and values are computed anew when they are resumed.
        self._server.post("/pause_generation", {"mode": "retract"})

    def begin_update(self, names: Sequence[str]) -> None:
        self._ranks = int(self._server.ask_for(self.kind.core_path, "tp_size"))
        answer = self._server.send("POST", "/begin_weight_update", {})
        if "already open" in answer.text:  # left by an update that failed
            self._server.post("/end_weight_update", {})
            self._server.post("/begin_weight_update", {})
        elif answer.status_code != 200:
            raise self._error(
                f"{self.url} did not open a weight update: HTTP {answer.status_code} {answer.text[:2000]}"
            )
        self._tell({"step": "begin", "names": list(names)})

    def _workers(self) -> int:
        return self._ranks

    def _load(self, bucket: dict[str, Any]) -> None:
        self._tell({"step": "bucket", "bucket": bucket})

    def finish_update(self, version: int) -> None:
        # In this order: while a tensor is missing the update stays open and the version is the old one.
        self._tell({"step": "finish"}, version)
        self._server.post("/end_weight_update", {})

    def _tell(self, message: dict[str, Any], version: int | None = None) -> None:
        self._server.post("/update_weights_from_tensor", update_body(message, self._ranks, version))

    def flush_cache(self) -> None:
        self._server.post("/flush_cache")

    def _resume(self) -> None:
        self._server.post("/continue_generation", {})

    # ---- memory ----

    def _sleep(self) -> None:
        self._server.post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})

    def _wake(self, tag: str) -> None:
        self._server.post("/resume_memory_occupation", {"tags": [tag]})


def own_python() -> str:
    """Python of the environment beside the project's own."""
    python = Path(f"{sys.prefix}-sglang/bin/python")
    if not python.exists():
        raise RecipeError(
            f"engine.kind is sglang and its environment {python.parent.parent} does not exist: run `bash "
            "launch/setup.sh --engine sglang`, or give another environment's Python as engine.python"
        )
    return str(python)
