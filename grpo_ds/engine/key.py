"""The shared secret between the trainer and its engines: who may be joined, who may listen, who is answered.

The weight-update routes of vLLM have no password of their own, and whoever reaches them decides what the engine says.
So every server that is started through `grpo_ds.engine.serve` or `.sglang_serve` with the environment variable
GRPO_DS_ENGINE_KEY answers no request, on any route, without it (HTTP 401); without the variable it listens on loopback
only. Servers of the run itself get a fresh key. The key, prompts and responses travel unencrypted unless the url begins
with https (the engines' own options --ssl-keyfile and --ssl-certfile); weights always do: the network between trainer
and engines must be a private one. Imports nothing but the standard library, because it also runs inside engines.
"""

from __future__ import annotations

import hmac
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from grpo_ds.config import RecipeError
from grpo_ds.engine.base import KEY_VARIABLE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHORTEST = 16

Message = MutableMapping[str, Any]


def shared_key() -> str | None:
    """The key in the environment; RecipeError for one that could be guessed or is no header value."""
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return None
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise RecipeError(
            f"environment variable {KEY_VARIABLE} must hold at least {_SHORTEST} ASCII characters without spaces: take "
            "the output of `openssl rand -hex 32`"
        )
    return key


def checked_urls(urls: Sequence[str], key: str | None) -> list[str]:
    """The urls without a slash at their end.

    Raises RecipeError for one that is listed twice (it would get each weight twice), and as `checked_url` does.
    """
    checked = [checked_url(url, key) for url in urls]
    for url in checked:
        if checked.count(url) > 1:
            raise RecipeError(f"engine.urls contains {url} {checked.count(url)} times: give each server once")
    return checked


def checked_url(url: str, key: str | None) -> str:
    """The url without a slash at its end; RecipeError for another host than loopback while there is no key."""
    if not _is_plain(url.rstrip("/")):
        shown = "an address with @" if "@" in url else repr(url)  # what precedes an @ is a password
        raise RecipeError(f"engine.urls contains {shown}: give http://HOST:PORT or https://HOST:PORT")
    if not on_loopback(url) and key is None:
        raise RecipeError(
            f"engine.urls contains {url!r}, which is not on loopback, and there is no environment variable "
            f"{KEY_VARIABLE}: start that server and this run with the same key in it, so that nobody else can change "
            "the weights"
        )
    return url.rstrip("/")


def _is_plain(url: str) -> bool:
    """Whether it is http(s)://HOST:PORT and no more."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and bool(parts.port) and "@" not in parts.netloc
    except ValueError:  # a port that is no number, a bracket that is not closed
        return False
    return named and parts.scheme in ("http", "https") and not (parts.path or parts.query or parts.fragment)


def on_loopback(url: str) -> bool:
    """Whether only this machine reaches the url."""
    return urlsplit(url).hostname in LOOPBACK


def listen_words(words: list[str]) -> list[str]:
    """The command line of a server with its host said in so many words, because the engines' defaults differ.

    Ends the process with one sentence when the host is not loopback and there is no key.
    """
    host = "127.0.0.1"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--host":
            host = following
        elif word.startswith("--host="):
            host = word.removeprefix("--host=")
    try:
        key = shared_key()
    except RecipeError as error:
        sys.exit(str(error))
    if host not in LOOPBACK and key is None:
        sys.exit(
            f"--host {host} lets other machines change the weights: set the environment variable {KEY_VARIABLE}, to the "
            "same value as where the run is started, or listen on 127.0.0.1"
        )
    return [*words, "--host", host]


class RequireKey:
    """ASGI middleware that answers 401 to everything that does not carry the key of the environment."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set, so there is nothing to require")
        self._app = app
        self._wanted = f"Bearer {key}".encode()

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """As ASGI wants it; only the server's own start and end pass without the key."""
        if scope["type"] == "lifespan" or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": f"this server wants its {KEY_VARIABLE}\n".encode()})

    def _allowed(self, scope: MutableMapping[str, Any]) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._wanted)
