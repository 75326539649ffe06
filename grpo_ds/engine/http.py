"""HTTP as the engines need it: with the shared key, without it, and many requests at once. The only user of httpx."""

from __future__ import annotations

import asyncio
import resource
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

Answer = httpx.Response
"""`status_code`, `text` and `json()`."""
T = TypeVar("T")

# A new connection a request: a kept one may be closed by the server just when it is used again, and no request here can
# simply be repeated.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
_MAX_CONNECTIONS = 256
_CLOSE_S = 10.0
"""Seconds in which what is under way must have been ended."""


class Unreachable(Exception):
    """No answer came; the message says why."""


def connections(servers: int) -> int:
    """Requests that may be open at each of so many servers: together they take half of the process' file descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return max(1, min(_MAX_CONNECTIONS, limit // 2 // servers))


class Http:
    """Requests that carry the key, if there is one. Redirects are not followed and proxies not used."""

    def __init__(self, key: str | None, *, secure: bool = False) -> None:
        """secure: for https; the server's certificate must be one that this system trusts (or SSL_CERT_FILE names)."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Without https httpx would still read its own bundle of certificates for every client.
        self._options: dict[str, Any] = {
            "trust_env": False,
            "verify": ssl.create_default_context() if secure else False,
        }
        self._client = httpx.Client(headers=headers, limits=_LIMITS, **self._options)
        self._async_client = httpx.AsyncClient(headers=headers, limits=_LIMITS, timeout=None, **self._options)
        self._loop = _Loop()

    def close(self) -> None:
        """End what is under way."""
        self._client.close()
        self._loop.close(self._async_client.aclose)

    def request(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> Answer:
        """One request with a JSON body; raises Unreachable."""
        try:
            return self._client.request(method, url, json=body, timeout=timeout_s)
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: closed by another thread
            raise Unreachable(f"{type(error).__name__} {error}") from error

    def stranger(self, url: str, timeout_s: float) -> int:
        """The status with which an empty POST without the key is answered; raises Unreachable."""
        try:
            return httpx.post(url, json={}, timeout=timeout_s, **self._options).status_code
        except httpx.TransportError as error:
            raise Unreachable(f"{type(error).__name__} {error}") from error

    async def post(self, url: str, body: dict[str, Any]) -> Answer:
        """One request without a deadline of its own, inside `beside`; raises Unreachable."""
        try:
            return await self._async_client.post(url, json=body)
        except httpx.TransportError as error:
            raise Unreachable(f"{type(error).__name__} {error}") from error

    def beside(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs work in the one thread for all that is under way; it is cancelled by `close`, after which none begins."""
        return self._loop.begin(work)


class _Loop:
    """An event loop in a thread of its own, from the first call of `begin` on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._closed:
                work.close()
                raise Unreachable("the engine was closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: a hung server must not keep the process from ending.
                self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="engine-http")
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Cancels everything, then awaits last() and ends the thread. May be called more than once."""
        with self._lock:
            first, self._closed = not self._closed, True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or not first:
            return
        try:
            asyncio.run_coroutine_threadsafe(_end(last), loop).result(_CLOSE_S)
        except TimeoutError:
            raise TimeoutError(f"requests to an engine did not end within {_CLOSE_S:g} s of being cancelled") from None
        finally:
            loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_S)
        loop.close()


async def _end(last: Callable[[], Awaitable[None]]) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await last()
