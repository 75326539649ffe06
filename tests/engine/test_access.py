"""Who a server answers, on real servers: whoever has the key, and nobody else on any route."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from grpo_ds.config import RecipeError
from grpo_ds.engine.base import KEY_VARIABLE, EngineDown, SamplingSpec
from tests.engine.bench import Bench, assert_logprobs_match, new_engine, new_server, requests
from tests.engine.conftest import SGLANG
from tests.engine.test_flight import computing
from tests.engine.test_process import descendants
from tests.engine.test_update import Sender, publish

SPEC = SamplingSpec(n=1, max_tokens=4, temperature=0.0)
EXPECTED = {
    "vllm": {"/update_weights", "/collective_rpc", "/weight_info", "/pause", "/health", "/inference/v1/generate"},
    "sglang": {"/update_weights_from_tensor", "/model_info", "/pause_generation", "/health", "/generate"},
}


@pytest.fixture(params=["vllm_tied", pytest.param("sglang_tied", marks=SGLANG)])
def served(request: pytest.FixtureRequest) -> tuple[str, Bench]:
    return str(request.param).removesuffix("_tied"), request.getfixturevalue(request.param)


def key_of(engine: Any) -> str:
    return str(engine._http._client.headers["Authorization"].removeprefix("Bearer "))


def test_no_route_answers_without_the_key(served: tuple[str, Bench]) -> None:
    kind, bench = served
    engine: Any = bench.engine
    url = engine.url
    described = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {key_of(engine)}"}, timeout=60)
    routes = {(path, method) for path, methods in described.json()["paths"].items() for method in methods}
    assert {path for path, _ in routes} >= EXPECTED[kind]
    # Mounted, not described.
    routes |= {("/metrics", "get"), ("/metrics/", "get"), ("/docs", "get"), ("/openapi.json", "get"), ("/", "get")}
    with httpx.Client(trust_env=False, timeout=60) as stranger:
        for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": f"Basic {key_of(engine)}"}):
            answered = {(path, m): stranger.request(m, url + path, headers=headers).status_code for path, m in routes}
            assert set(answered.values()) == {401}, {k: v for k, v in answered.items() if v != 401}


def test_the_key_is_in_no_command_line_and_no_log(served: tuple[str, Bench]) -> None:
    engine: Any = served[1].engine
    key = key_of(engine)
    assert len(key) == 32
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert key.encode() not in process.read_bytes(), process
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended in the meantime
    assert key not in engine._server.process._log.read_text()


def test_only_this_machine_can_connect(served: tuple[str, Bench]) -> None:
    """Neither to the web server nor to what the engines open for their own processes."""
    engine: Any = served[1].engine
    family = descendants(engine._server.process.pid)
    open_to = {c.laddr.ip for process in family for c in process.net_connections("inet") if c.status == "LISTEN"}
    assert open_to == {"127.0.0.1"}


# 127.1 is this machine, not spelled as loopback: to the engine it is another host.


def test_a_server_elsewhere_is_joined_with_the_key_it_demands(
    served: tuple[str, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, bench = served
    mine: Any = bench.engine
    monkeypatch.setenv(KEY_VARIABLE, key_of(mine))
    joined = new_server(kind, "unused", tmp_path, mine.url.replace("127.0.0.1", "127.1"))
    try:
        joined.start()
        joined.wait_ready(timeout_s=60)
        assert joined.alive()
        assert joined.version() == mine.version()
        for (one,), (other,) in zip(joined.generate(requests(2), SPEC), mine.generate(requests(2), SPEC), strict=True):
            assert (one.token_ids, one.spans) == (other.token_ids, other.spans)
            # The second time the prompt is in SGLang's cache, and the last bits are others.
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    finally:
        joined.close()
    assert mine.alive(), "who joins a server does not end it"


def test_a_server_elsewhere_that_is_stopped_is_waited_for_and_gets_the_weights_it_missed(
    served: tuple[str, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP for the process that computes: the web server alone would still say that it is well."""
    kind, bench = served
    mine: Any = bench.engine
    monkeypatch.setenv(KEY_VARIABLE, key_of(mine))
    pool: Any = new_engine(kind, "unused", tmp_path, urls=[mine.url], max_restarts=2, stall_timeout_s=5)
    user, sender, asked = Bench(pool, bench.model), Sender(2**20), requests(64)
    scheduler = computing(mine)
    try:
        pool.start()
        pool.wait_ready()
        publish(user, sender, 50)
        timer = threading.Timer(0.5, scheduler.suspend)
        timer.start()
        begun = time.monotonic()
        with pytest.raises(EngineDown) as down:
            pool.generate(asked, SamplingSpec(n=4, max_tokens=200))
        assert time.monotonic() - begun < 30
        scheduler.resume()
        publish(user, sender, 51)  # waits until it is back
        rest = [request for request in asked if request.request_id not in down.value.finished]
        answers = pool.generate(rest, SamplingSpec(n=4, max_tokens=200))
        assert {span.version for row in answers for rollout in row for span in rollout.spans} == {51}
        assert_logprobs_match(user, rest[0], answers[0][0], 1.0)
        counts = pool.take_counts()
        assert (counts["quarantined"], counts["restarts"]) == (1, 1) and counts["redone_requests"] > 0
    finally:
        scheduler.resume()
        pool.close()
        os.close(sender.fd)
    assert mine.alive()


def test_a_server_elsewhere_that_has_another_key_is_named(
    served: tuple[str, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, bench = served
    mine: Any = bench.engine
    monkeypatch.setenv(KEY_VARIABLE, "another-key-of-16-characters")
    joined = new_server(kind, "unused", tmp_path, mine.url.replace("127.0.0.1", "127.1"))
    with pytest.raises(RecipeError, match=r"http://127.1:\d+ refuses the key in GRPO_DS_ENGINE_KEY"):
        joined.wait_ready(timeout_s=60)
    joined.close()


class Obeys(http.server.BaseHTTPRequestHandler):
    """As vLLM with --api-key: the documented routes want a key, those that change the weights do not."""

    def do_POST(self) -> None:
        self.send_response(401 if self.path.startswith("/v1") else 422)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def open_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Obeys) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("kind", "module"), [("vllm", "grpo_ds.engine.serve"), ("sglang", "grpo_ds.engine.sglang_serve")]
)
def test_a_server_elsewhere_that_obeys_strangers_is_refused_at_the_start(
    open_server: str, kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "a-key-of-16-or-more-characters")
    joined = new_server(kind, "unused", tmp_path, open_server)
    with pytest.raises(RecipeError, match=rf"obeys strangers \(POST /update_weights.* HTTP 422\): .*-m {module}`"):
        joined.start()
    joined.close()
