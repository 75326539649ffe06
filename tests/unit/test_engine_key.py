"""Who may be joined, who may listen, who is answered."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine import make_engine
from grpo_ds.engine.base import KEY_VARIABLE
from grpo_ds.engine.key import RequireKey, checked_url, checked_urls, listen_words, shared_key
from grpo_ds.engine.serve import command

KEY = "0123456789abcdef"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return KEY


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_another_host_is_joined_only_with_a_key(tmp_path: Path, kind: str) -> None:
    config = EngineConfig(kind=kind, urls=["http://127.0.0.1:1", "http://10.0.0.1:8000"])
    with pytest.raises(RecipeError, match=r"'http://10.0.0.1:8000'.* not on loopback.* no .*GRPO_DS_ENGINE_KEY"):
        make_engine(config, model_path="m", dtype="float32", max_model_len=64, log_dir=tmp_path, device="cpu", seed=0)


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://127.0.0.1:8000", "https://127.0.0.1", "127.0.0.1:8000", "http://"),
        *("http://127.0.0.1", "http://127.0.0.1:0"),
        *("http://h:99999", "http://h:port", "http://[::1:8000", "http://h:1/v1", "http://h:1?x=1", "http://h:1#x"),
    ],
)
def test_what_is_no_http_address_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="give http://HOST:PORT") as refusal:
        checked_url(url, KEY)
    assert repr(url) in str(refusal.value)


def test_an_address_with_a_password_is_refused_without_being_shown() -> None:
    with pytest.raises(RecipeError, match="give http://HOST:PORT") as refusal:
        checked_url("http://127.0.0.1:secret@10.0.0.1:8000", KEY)
    assert "secret" not in str(refusal.value)


def test_a_server_is_joined_once() -> None:
    """Two buckets at once would go into the same weights."""
    with pytest.raises(RecipeError, match="engine.urls contains http://127.0.0.1:1 2 times: give each server once"):
        checked_urls(["http://127.0.0.1:1", "http://127.0.0.1:1/"], None)


def test_a_slash_at_the_end_belongs_to_no_path(tmp_path: Path) -> None:
    config = EngineConfig(urls=["http://127.0.0.1:1/", "http://127.0.0.1:2"])
    pool: Any = make_engine(
        config, model_path="m", dtype="float32", max_model_len=64, log_dir=tmp_path, device="cpu", seed=0
    )
    assert [replica.engine.url for replica in pool._replicas.all] == ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def test_a_name_that_only_begins_like_loopback_is_another_host() -> None:
    with pytest.raises(RecipeError, match="not on loopback"):
        checked_url("http://127.0.0.1.example.org:1", None)
    assert checked_url("http://127.0.0.1.example.org:1/", KEY) == "http://127.0.0.1.example.org:1"
    assert checked_url("http://[::1]:1", None) == "http://[::1]:1"
    assert checked_url("https://engine.example.org:1/", KEY) == "https://engine.example.org:1"
    with pytest.raises(RecipeError, match="not on loopback"):
        checked_url("https://engine.example.org:1", None)


@pytest.mark.parametrize("bad", ["short", "with a space in it", "ümlaut-ümlaut-ümlaut", "line\nline-line-line"])
def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, bad)
    with pytest.raises(RecipeError, match="at least 16 ASCII characters") as refusal:
        shared_key()
    assert bad not in str(refusal.value)


@pytest.mark.parametrize("words", [["--host", "0.0.0.0"], ["--host=::"], ["--host", "127.0.0.1", "--host", "10.0.0.7"]])
def test_nothing_listens_to_other_machines_without_a_key(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="lets other machines change the weights: set .*GRPO_DS_ENGINE_KEY"):
        listen_words(words)


def test_the_command_of_an_engine_node_ends_with_the_sentence() -> None:
    words = [sys.executable, "-m", "grpo_ds.engine.serve", "--model", "m", "--host", "0.0.0.0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("--host 0.0.0.0 lets other machines change the weights: set the environment variable")
    assert len(done.stderr.splitlines()) == 1


def test_the_host_is_always_said(key: str) -> None:
    assert listen_words(["--port", "1"])[-2:] == ["--host", "127.0.0.1"]
    assert listen_words(["--host=0.0.0.0", "--port", "1"])[-2:] == ["--host", "0.0.0.0"]


def test_a_server_with_a_key_gets_the_middleware_and_never_the_key(key: str) -> None:
    words = command(["--model", "m"])
    assert words[words.index("--middleware") + 1] == "grpo_ds.engine.key.RequireKey"
    assert not any(KEY in word for word in words)
    assert "--worker-extension-cls" in words and "--enable-scale-out" in words


def test_a_server_without_a_key_has_no_middleware() -> None:
    assert "--middleware" not in command(["--model", "m"])


def answered(headers: list[tuple[bytes, bytes]], kind: str = "http") -> tuple[bool, list[MutableMapping[str, Any]]]:
    """Whether the app was reached, and what the middleware said itself."""
    reached: list[str] = []
    said: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        said.append(message)

    asyncio.run(RequireKey(app)({"type": kind, "path": "/health", "headers": headers}, receive, send))
    return bool(reached), said


def test_only_the_key_opens(key: str) -> None:
    assert answered([(b"authorization", b"Bearer " + KEY.encode())]) == (True, [])
    for headers in (
        [],
        [(b"authorization", KEY.encode())],
        [(b"authorization", b"Bearer " + KEY.encode() + b"0")],
        [(b"authorization", b"Bearer \xff")],
        [(b"x-api-key", b"Bearer " + KEY.encode())],
    ):
        reached, said = answered(headers)
        assert not reached and said[0]["status"] == 401


def test_a_websocket_is_closed_and_the_servers_start_passes(key: str) -> None:
    assert answered([], "websocket") == (False, [{"type": "websocket.close", "code": 1008}])
    assert answered([], "lifespan") == (True, [])


def test_the_middleware_does_not_start_without_a_key() -> None:
    with pytest.raises(RuntimeError, match="nothing to require"):
        RequireKey(lambda *args: asyncio.sleep(0))
