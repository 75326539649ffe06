"""HTTP as the engines need it: with the shared key, without it, and many requests at once. The only user of httpx."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

Answer = httpx.Response
"""`status_code`, `text` and `json()`."""
Post = Callable[[str, dict[str, Any]], Awaitable[Answer]]

# A new connection a request: a kept one may be closed by the server just when it is used again, and no request here can
# simply be repeated.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
# verify: plain http only; httpx would read the certificate bundle anew for every client.
_OPTIONS: dict[str, Any] = {"limits": _LIMITS, "trust_env": False, "verify": False}


class Unreachable(Exception):
    """No answer came; the message says why."""


class Http:
    """Requests that carry the key, if there is one. Redirects are not followed and proxies not used."""

    def __init__(self, key: str | None) -> None:
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=self._headers, **_OPTIONS)

    def close(self) -> None:
        """End what is under way."""
        self._client.close()

    def request(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> Answer:
        """One request with a JSON body; raises Unreachable."""
        try:
            return self._client.request(method, url, json=body, timeout=timeout_s)
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: closed by another thread
            raise Unreachable(f"{type(error).__name__} {error}") from error

    def stranger(self, url: str, timeout_s: float) -> int:
        """The status with which an empty POST without the key is answered; raises Unreachable."""
        try:
            return httpx.post(url, json={}, timeout=timeout_s, trust_env=False).status_code
        except httpx.TransportError as error:
            raise Unreachable(f"{type(error).__name__} {error}") from error

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Post]:
        """A function that posts JSON to a URL, without a deadline of its own; it raises Unreachable."""
        async with httpx.AsyncClient(headers=self._headers, timeout=None, **_OPTIONS) as client:

            async def post(url: str, body: dict[str, Any]) -> Answer:
                try:
                    return await client.post(url, json=body)
                except httpx.TransportError as error:
                    raise Unreachable(f"{type(error).__name__} {error}") from error

            yield post
