"""The servers of an engine: one that is started here, or some that run already; and whether they obey strangers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_ds.config import RecipeError
from grpo_ds.engine.base import KEY_VARIABLE, EngineError
from grpo_ds.engine.http import Answer, Http, Unreachable
from grpo_ds.engine.key import on_loopback
from grpo_ds.engine.process import ServerProcess

_HEALTH_TIMEOUT_S = 5.0
_STRANGER_TIMEOUT_S = 60.0
"""Of the one question that is not repeated."""
_CONTROL_TIMEOUT_S = 600.0
"""Deadline of one step of a weight update; the trainer's own deadline for the whole update is usually shorter."""
RUBBISH = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises that is no JSON, or not the JSON that was asked for."""


@dataclass(frozen=True, slots=True)
class ServerKind:
    """What is known about a kind of server."""

    label: str
    """The engine's name in messages and, in lower case, in the name of its log file."""
    module: str
    """What `python -m` runs."""
    control_paths: tuple[str, ...]
    """Routes that change the weights when they are posted to; an empty body is refused by all of them."""


class Servers(ABC):
    """At least one server, all with the same weights."""

    def __init__(self, kind: ServerKind, http: Http) -> None:
        self._kind = kind
        self._http = http

    @property
    @abstractmethod
    def urls(self) -> Sequence[str]:
        """Where they are, without a slash at the end."""

    @abstractmethod
    def start(self) -> None:
        """Begin to start what has to be started."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether they run, as far as can be told at once."""

    @abstractmethod
    def died(self) -> bool:
        """Whether they are known to be gone; asks nobody."""

    @abstractmethod
    def close(self) -> None:
        """End what was started here. May be called more than once."""

    @abstractmethod
    def error(self, message: str) -> EngineError:
        """The message, with the end of the log where there is one."""

    @abstractmethod
    def _check(self) -> None:
        """Raises EngineError when waiting has no use any more."""

    @abstractmethod
    def _healthy(self, url: str) -> bool:
        """Whether the server answers that it is well."""

    def wait_ready(self, timeout_s: float) -> None:
        """Block until all of them answer; EngineError after timeout_s seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._check()
            if all(self._healthy(url) for url in self.urls):
                return
            if time.monotonic() > deadline:
                raise self.error(
                    f"{', '.join(self.urls)} did not answer its health check within {timeout_s:g} s "
                    "(engine.start_timeout_s)"
                )
            time.sleep(0.1)

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Answer]:
        """POST to every server; returns their answers by url."""
        return {url: self.call("POST", url, path, body) for url in self.urls}

    def call(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """One request; EngineError unless it is answered with HTTP 200."""
        answer = self.send(method, url, path, body)
        if answer.status_code != 200:
            raise self.error(f"{method} {url}{path} was refused with HTTP {answer.status_code}: {answer.text[:2000]}")
        return answer

    def ask_for(self, url: str, path: str, field: str) -> Any:
        """A field of the JSON object that a GET is answered with."""
        answer = self.call("GET", url, path)
        try:
            return answer.json()[field]
        except RUBBISH as error:
            raise self.error(f"GET {url}{path} was answered without {field}, {shown(answer, error)}") from error

    def send(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> Answer:
        """One request; EngineError when no answer comes."""
        try:
            return self._http.request(method, url + path, body, _CONTROL_TIMEOUT_S)
        except Unreachable as error:
            raise self.error(f"{method} {url}{path} failed: {error}") from error

    def _health(self, url: str, path: str = "/health") -> Answer:
        return self._http.request("GET", url + path, None, _HEALTH_TIMEOUT_S)

    def _obeys_strangers(self, url: str, timeout_s: float = _HEALTH_TIMEOUT_S) -> str | None:
        """What the server answered without the key, other than a refusal; raises Unreachable."""
        for path in self._kind.control_paths:
            status = self._http.stranger(url + path, timeout_s)
            if status not in (401, 403):
                return f"POST {path} without a key was answered with HTTP {status}"
        return None


class OwnServer(Servers):
    """One that this process starts and ends."""

    def __init__(self, kind: ServerKind, http: Http, process: ServerProcess, name: str) -> None:
        """name: what it calls its model, so that no other server that answers on the port is taken for it."""
        super().__init__(kind, http)
        self.process = process
        self._name = name

    @property
    def urls(self) -> Sequence[str]:
        return [self.process.url]

    def start(self) -> None:
        self.process.start()

    def wait_ready(self, timeout_s: float) -> None:
        super().wait_ready(timeout_s)
        try:
            obeyed = self._obeys_strangers(self.process.url, _STRANGER_TIMEOUT_S)
        except Unreachable as error:
            raise self.error(f"the {self._kind.label} server was ready and then did not answer: {error}") from error
        if obeyed:
            raise self.error(f"the {self._kind.label} server that was started here obeys strangers: {obeyed}")

    def alive(self) -> bool:
        return self.process.alive()

    def died(self) -> bool:
        return not self.process.alive()

    def close(self) -> None:
        self.process.close()

    def error(self, message: str) -> EngineError:
        return self.process.error(message)

    def _check(self) -> None:
        self.process.check()

    def _healthy(self, url: str) -> bool:
        try:
            health, served = self._health(url), self._health(url, "/v1/models")
            return {health.status_code, served.status_code} == {200} and served.json()["data"][0]["id"] == self._name
        except Unreachable:
            return False
        except RUBBISH:
            return False  # no such server, but somebody else on the port


class JoinedServers(Servers):
    """Some that were started elsewhere; one that other machines may reach has to demand the key."""

    def __init__(self, kind: ServerKind, http: Http, urls: Sequence[str]) -> None:
        """urls: as `checked_urls` returns them."""
        super().__init__(kind, http)
        self._urls = urls
        self._guarded: set[str] = set()

    @property
    def urls(self) -> Sequence[str]:
        return self._urls

    def start(self) -> None:
        for url in self._urls:
            try:
                self._require_guarded(url)
            except Unreachable:
                continue  # not up yet: asked again before it is used

    def alive(self) -> bool:
        return all(self._healthy(url) for url in self._urls)

    def died(self) -> bool:
        return False

    def close(self) -> None:
        """They are not ours to end."""

    def error(self, message: str) -> EngineError:
        return EngineError(message)

    def _check(self) -> None:
        """Nothing is known of them but what they answer."""

    def _healthy(self, url: str) -> bool:
        try:
            self._require_guarded(url)  # before the key is sent there
            health = self._health(url)
        except Unreachable:
            return False
        if health.status_code in (401, 403):
            raise RecipeError(
                f"engine.urls: {url} refuses the key in {KEY_VARIABLE}: start it and this run with the same one"
            )
        return health.status_code == 200

    def _require_guarded(self, url: str) -> None:
        """RecipeError when a server that other machines may reach obeys them."""
        if url in self._guarded or on_loopback(url):
            return
        if obeyed := self._obeys_strangers(url):
            raise RecipeError(
                f"engine.urls: {url} obeys strangers ({obeyed}): start it with `python -m {self._kind.module}` and the "
                f"environment variable {KEY_VARIABLE}"
            )
        self._guarded.add(url)


def shown(answer: Answer, error: Exception) -> str:
    """Why an answer is rubbish, and how it begins."""
    return f"{type(error).__name__} {error}: {answer.text[:200]}"
