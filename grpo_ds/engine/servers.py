"""An engine's server: one that is started here, or one that runs already; and whether it obeys strangers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
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
    core_path: str
    """Route of a GET that is answered by the process that computes: the web server alone may be well."""


class Server(ABC):
    """HTTP to one server, without a slash at the end of its `url`."""

    def __init__(self, kind: ServerKind, http: Http) -> None:
        self._kind = kind
        self._http = http
        self._silence = ""
        """Why the last health check had no answer."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is."""

    @abstractmethod
    def start(self) -> None:
        """Begin to start it, where it is ours to start."""

    @abstractmethod
    def alive(self) -> bool:
        """False when it is known to be gone; nobody is asked."""

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
    def _healthy(self) -> bool:
        """Whether the server answers that it is well."""

    def wait_ready(self, timeout_s: float) -> None:
        """Block until it answers; EngineError after timeout_s seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._check()
            if self._healthy():
                return
            if time.monotonic() > deadline:
                raise self.error(
                    f"{self.url} did not answer its health check within {timeout_s:g} s (engine.start_timeout_s)"
                    + (f": {self._silence}" if self._silence else "")
                )
            time.sleep(0.1)

    def post(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = _CONTROL_TIMEOUT_S) -> Answer:
        """A POST; EngineError unless it is answered with HTTP 200 within timeout_s seconds."""
        return self._require("POST", path, self.send("POST", path, body, timeout_s))

    def get(self, path: str) -> Answer:
        """A GET; EngineError unless it is answered with HTTP 200."""
        return self._require("GET", path, self.send("GET", path))

    def ask_for(self, path: str, field: str) -> Any:
        """A field of the JSON object that a GET is answered with."""
        answer = self.get(path)
        try:
            return answer.json()[field]
        except RUBBISH as error:
            raise self.error(f"GET {self.url}{path} was answered without {field}, {shown(answer, error)}") from error

    def send(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _CONTROL_TIMEOUT_S
    ) -> Answer:
        """One request, whatever is answered; EngineError when nothing is."""
        try:
            return self._http.request(method, self.url + path, body, timeout_s)
        except Unreachable as error:
            raise self.error(f"{method} {self.url}{path} failed: {error}") from error

    def _require(self, method: str, path: str, answer: Answer) -> Answer:
        if answer.status_code != 200:
            raise self.error(
                f"{method} {self.url}{path} was refused with HTTP {answer.status_code}: {answer.text[:2000]}"
            )
        return answer

    def _health(self, path: str = "/health") -> Answer:
        return self._http.request("GET", self.url + path, None, _HEALTH_TIMEOUT_S)

    def _obeys_strangers(self, timeout_s: float = _HEALTH_TIMEOUT_S) -> str | None:
        """What the server answered without the key, other than a refusal; raises Unreachable."""
        for path in self._kind.control_paths:
            status = self._http.stranger(self.url + path, timeout_s)
            if status not in (401, 403):
                return f"POST {path} without a key was answered with HTTP {status}"
        return None


class OwnServer(Server):
    """One that this process starts and ends."""

    def __init__(self, kind: ServerKind, http: Http, process: ServerProcess, name: str) -> None:
        """name: what it calls its model, so that no other server that answers on the port is taken for it."""
        super().__init__(kind, http)
        self.process = process
        self._name = name

    @property
    def url(self) -> str:
        return self.process.url

    def start(self) -> None:
        self.process.start()

    def wait_ready(self, timeout_s: float) -> None:
        super().wait_ready(timeout_s)
        try:
            obeyed = self._obeys_strangers(_STRANGER_TIMEOUT_S)
        except Unreachable as error:
            raise self.error(f"the {self._kind.label} server was ready and then did not answer: {error}") from error
        if obeyed:
            raise self.error(f"the {self._kind.label} server that was started here obeys strangers: {obeyed}")

    def alive(self) -> bool:
        return self.process.alive()

    def close(self) -> None:
        self.process.close()

    def error(self, message: str) -> EngineError:
        return self.process.error(message)

    def _check(self) -> None:
        self.process.check()

    def _healthy(self) -> bool:
        try:
            health, served = self._health(), self._health("/v1/models")
            return {health.status_code, served.status_code} == {200} and served.json()["data"][0]["id"] == self._name
        except Unreachable as error:
            self._silence = str(error)
            return False
        except RUBBISH:
            return False  # no such server, but somebody else on the port


class JoinedServer(Server):
    """One that was started elsewhere; if other machines may reach it, it has to demand the key."""

    def __init__(self, kind: ServerKind, http: Http, url: str) -> None:
        """url: as `checked_urls` returns them."""
        super().__init__(kind, http)
        self._url = url
        self._guarded = on_loopback(url)

    @property
    def url(self) -> str:
        return self._url

    def start(self) -> None:
        try:
            self._require_guarded()
        except Unreachable:
            return  # not up yet: asked again before it is used

    def alive(self) -> bool:
        """Always: its process is not ours to see."""
        return True

    def close(self) -> None:
        """It is not ours to end."""

    def error(self, message: str) -> EngineError:
        return EngineError(message)

    def _check(self) -> None:
        """Nothing is known of it but what it answers."""

    def _healthy(self) -> bool:
        try:
            self._require_guarded()  # before the key is sent there
            health = self._health()
            if health.status_code in (401, 403):
                raise RecipeError(
                    f"engine.urls: {self.url} refuses the key in {KEY_VARIABLE}: start it and this run with the same one"
                )
            return health.status_code == 200 and self._health(self._kind.core_path).status_code == 200
        except Unreachable as error:
            self._silence = str(error)
            return False

    def _require_guarded(self) -> None:
        """RecipeError when a server that other machines may reach obeys them."""
        if self._guarded:
            return
        if obeyed := self._obeys_strangers():
            raise RecipeError(
                f"engine.urls: {self.url} obeys strangers ({obeyed}): start it with `python -m {self._kind.module}` and "
                f"the environment variable {KEY_VARIABLE}"
            )
        self._guarded = True


def shown(answer: Answer, error: Exception) -> str:
    """Why an answer is rubbish, and how it begins."""
    return f"{type(error).__name__} {error}: {answer.text[:200]}"
