"""The SGLang engine: one server process of its own on loopback, spoken to over HTTP. Does not import SGLang."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import KEY_VARIABLE, RawRollout, Request, SamplingSpec
from grpo_ds.engine.server import ServerEngine, server_env
from grpo_ds.engine.sglang_wire import generate_bodies, parse_response, server_args, update_body


class SglangEngine(ServerEngine):
    """Starts (or, with engine.urls, joins) SGLang servers; implements `GenerationEngine`.

    A joined server must have been started with `python -m grpo_ds.engine.sglang_serve` and our flags
    (`grpo_ds.engine.sglang_wire.server_args`). A server of our own answers only requests that carry its key.
    """

    label = "SGLang"
    module = "grpo_ds.engine.sglang_serve"
    generate_path = "/generate"

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
        """Raises RecipeError for urls off loopback, a port that is taken, and an environment that was not made."""
        args = server_args(config.args, model_path, dtype, max_model_len, device, seed)
        key = None if config.urls else secrets.token_hex(16)
        python = "" if config.urls else config.python or _own_python()
        super().__init__(config, python, args, _server_env(key), log_dir, key)
        self._max_model_len = max_model_len
        self._ranks: dict[str, int] = {}

    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        return generate_bodies(request, spec, self._max_model_len)

    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        return parse_response(answer, request, spec)

    def _version_text(self, url: str) -> str:
        return str(self._call("GET", url, "/model_info").json()["weight_version"])

    def _on_ready(self) -> None:
        """The version is on the command line."""

    def _noise(self, line: str) -> bool:
        return "server_args=" in line  # all settings, the key among them

    # ---- weight updates ----

    def pause(self) -> None:
        # Requests in flight go back to the queue; their keys and values are computed anew when they are resumed.
        self._post("/pause_generation", {"mode": "retract"})

    def begin_update(self, names: Sequence[str]) -> None:
        for url in self._urls:
            self._ranks[url] = int(self._call("GET", url, "/server_info").json()["tp_size"])
            answer = self._send("POST", url, "/begin_weight_update", {})
            if "already open" in answer.text:  # left by an update that failed
                self._call("POST", url, "/end_weight_update", {})
                self._call("POST", url, "/begin_weight_update", {})
            elif answer.status_code != 200:
                raise self._error(f"{url} did not open a weight update: HTTP {answer.status_code} {answer.text[:2000]}")
        self._update({"step": "begin", "names": list(names)})

    def update_bucket(self, bucket: dict[str, Any]) -> None:
        self._update({"step": "bucket", "bucket": bucket})

    def finish_update(self, version: int) -> None:
        # In this order: while a tensor is missing the update stays open and the version is the old one.
        self._update({"step": "finish"}, version)
        self._post("/end_weight_update", {})

    def _update(self, message: dict[str, Any], version: int | None = None) -> None:
        for url in self._urls:
            self._call("POST", url, "/update_weights_from_tensor", update_body(message, self._ranks[url], version))

    def flush_cache(self) -> None:
        self._post("/flush_cache")

    def resume(self) -> None:
        self._post("/continue_generation", {})


def _own_python() -> str:
    """Python of the environment beside the project's own."""
    python = Path(f"{sys.prefix}-sglang/bin/python")
    if not python.exists():
        raise RecipeError(
            f"engine.kind is sglang and its environment {python.parent.parent} does not exist: run `bash "
            "launch/setup.sh --engine sglang`, or give another environment's Python as engine.python"
        )
    return str(python)


def _server_env(key: str | None) -> dict[str, str]:
    # Longer than the model's: by the few positions that SGLang keeps to itself (`sglang_wire`).
    forced = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    return server_env(forced | ({KEY_VARIABLE: key} if key else {}), {})
