"""The SGLang engine: servers spoken to over HTTP. Does not import SGLang."""

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
    """Starts (or, with engine.urls, joins) SGLang servers; implements `GenerationEngine`.

    A joined server must have been started with `python -m grpo_ds.engine.sglang_serve`.
    """

    kind = ServerKind(
        "SGLang",
        "grpo_ds.engine.sglang_serve",
        ("/update_weights_from_tensor", "/init_weights_update_group", "/set_internal_state"),
    )
    generate_path = "/generate"

    def __init__(self, config: EngineConfig, settings: EngineSettings) -> None:
        """Raises RecipeError for an environment that was not made, and as `ServerEngine` does."""
        python = "" if config.urls else config.python or own_python()
        super().__init__(config, settings, python, server_args(config, settings), server_env(settings.device))
        self._max_model_len = settings.max_model_len
        self._ranks: dict[str, int] = {}

    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        return generate_bodies(request, spec, self._max_model_len)

    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        return parse_response(answer, request, spec)

    def _abort(self, url: str) -> None:
        self._servers.call("POST", url, "/abort_request", {"abort_all": True})

    def _version_text(self, url: str) -> str:
        # The web server answers the second route by itself; the first one is answered by the schedulers.
        self._servers.call("GET", url, "/server_info")
        return str(self._servers.ask_for(url, "/model_info", "weight_version"))

    def _on_ready(self) -> None:
        """The version is on the command line."""

    def _noise(self, line: str) -> bool:
        return "server_args=" in line  # all settings, thousands of characters

    # ---- weight updates ----

    def _pause(self) -> None:
        # Requests in flight go back to the queue; their keys and values are computed anew when they are resumed.
        self._servers.post("/pause_generation", {"mode": "retract"})

    def begin_update(self, names: Sequence[str]) -> None:
        for url in self._urls:
            self._ranks[url] = int(self._servers.ask_for(url, "/server_info", "tp_size"))
            answer = self._servers.send("POST", url, "/begin_weight_update", {})
            if "already open" in answer.text:  # left by an update that failed
                self._servers.call("POST", url, "/end_weight_update", {})
                self._servers.call("POST", url, "/begin_weight_update", {})
            elif answer.status_code != 200:
                raise self._error(f"{url} did not open a weight update: HTTP {answer.status_code} {answer.text[:2000]}")
        self._update({"step": "begin", "names": list(names)})

    def _workers(self, url: str) -> int:
        return self._ranks[url]

    def _load(self, url: str, bucket: dict[str, Any]) -> None:
        self._tell(url, {"step": "bucket", "bucket": bucket})

    def finish_update(self, version: int) -> None:
        # In this order: while a tensor is missing the update stays open and the version is the old one.
        self._update({"step": "finish"}, version)
        self._servers.post("/end_weight_update", {})

    def _update(self, message: dict[str, Any], version: int | None = None) -> None:
        for url in self._urls:
            self._tell(url, message, version)

    def _tell(self, url: str, message: dict[str, Any], version: int | None = None) -> None:
        self._servers.call("POST", url, "/update_weights_from_tensor", update_body(message, self._ranks[url], version))

    def flush_cache(self) -> None:
        self._servers.post("/flush_cache")

    def _resume(self) -> None:
        self._servers.post("/continue_generation", {})

    # ---- memory ----

    def _sleep(self) -> None:
        self._servers.post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})

    def _wake(self, tag: str) -> None:
        self._servers.post("/resume_memory_occupation", {"tags": [tag]})


def own_python() -> str:
    """Python of the environment beside the project's own."""
    python = Path(f"{sys.prefix}-sglang/bin/python")
    if not python.exists():
        raise RecipeError(
            f"engine.kind is sglang and its environment {python.parent.parent} does not exist: run `bash "
            "launch/setup.sh --engine sglang`, or give another environment's Python as engine.python"
        )
    return str(python)
