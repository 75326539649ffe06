"""A server that answers HTTP 200 with something else than was asked for is an engine that failed, not a crash of ours."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_ds.config import EngineConfig
from grpo_ds.engine import make_server
from grpo_ds.engine.base import EngineError, EngineSettings, GenerationEngine, Request, SamplingSpec

ASKED = Request((5, 6, 7), 0, "p0")
RUBBISH = {
    "no JSON": b"<html>gateway</html>",
    "a number": b"7",
    "nothing": b"null",
    "an empty object": b"{}",
    "a list of nothing": b"[null]",
    "no choices": b'{"choices": null, "meta_info": null}',
    "choices without tokens": b'{"choices": [{"index": 0}], "output_ids": [], "meta_info": {}}',
}


class Answers(http.server.ThreadingHTTPServer):
    body = b""


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self) -> None:
        assert isinstance(self.server, Answers)
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(200)
        self.send_header("content-length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture(params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, server: Answers, tmp_path: Path) -> Iterator[GenerationEngine]:
    url = f"http://127.0.0.1:{server.server_port}"
    settings = EngineSettings("m", "float32", 64, tmp_path, "cpu", 0, url=url)
    made = make_server(EngineConfig(kind=request.param), settings)
    yield made
    made.close()


@pytest.mark.parametrize("what", RUBBISH)
def test_rubbish_for_a_request_names_the_request(engine: GenerationEngine, server: Answers, what: str) -> None:
    server.body = RUBBISH[what]
    with pytest.raises(EngineError, match=r"request p0\b"):
        engine.generate([ASKED], SamplingSpec(n=1, max_tokens=4))


@pytest.mark.parametrize("what", RUBBISH)
def test_rubbish_for_the_version_names_the_server(engine: GenerationEngine, server: Answers, what: str) -> None:
    server.body = RUBBISH[what]
    with pytest.raises(EngineError, match=rf"GET http://127.0.0.1:{server.server_port}/\w+ was answered without"):
        engine.version()
