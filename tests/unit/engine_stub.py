"""A server that speaks vLLM's routes without a model: it can be slow, fall silent, die and come back."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any


class Stub(http.server.ThreadingHTTPServer):
    """Answers each request with one token a response, its seed modulo 1000. Runs from the start to `close`."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0, version: str = "default", tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_port}"
        self.version = version
        self.seconds = 0.0
        self.may_answer: Callable[[], bool] = lambda: True
        self.talks = threading.Event()
        self.talks.set()
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.open = self.most_open = 0
        """Requests that are being answered; the most there were at once."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Its connections break, and its port is free."""
        self.talks.set()
        self.shutdown()
        self.server_close()

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.talks.wait()
        if path.startswith("/inference"):
            return self.generate(body)
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        return {"weight_version": self.version, "success": True}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked.append(body["request_id"])
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        time.sleep(self.seconds)
        while not self.may_answer():
            time.sleep(0.005)
        self.talks.wait()
        with self.lock:
            self.open -= 1
        return {
            "choices": [self.choice(k, body["sampling_params"]["seed"]) for k in range(body["sampling_params"]["n"])]
        }

    def choice(self, k: int, seed: int) -> dict[str, Any]:
        return {
            "index": k,
            "token_ids": [(seed + k) % 1000],
            "logprobs": {"content": [{"logprob": -1.0}]},
            "finish_reason": "length",
            "weight_versions": [{"version": self.version, "start": 0, "end": 1}],
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone."""


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self) -> None:
        assert isinstance(self.server, Stub)
        said = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.dumps(self.server.reply(self.path, json.loads(said or b"{}"))).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        pass
