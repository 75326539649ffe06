"""What the engines with a server process of their own share: supervision, HTTP, errors with the end of the log."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx

import grpo_ds
from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineError, RawRollout, Request, SamplingSpec, parse_version

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_CONNECTIONS = 256
# A new connection a request: a kept one may be closed by the server just when it is used again, and no request here can
# simply be repeated.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)
_PORT_TRIES = 3
_LOG_TAIL_BYTES = 12000
_CONTROL_TIMEOUT_S = 600.0
"""Deadline of one step of a weight update; the trainer's own deadline for the whole update is usually shorter."""


class ServerEngine(ABC):
    """Starts (or, with engine.urls, joins) servers on loopback; the part of `GenerationEngine` that is HTTP.

    Requests are spread over the servers round-robin; weight updates go to each of them.
    """

    label: ClassVar[str]
    """The engine's name in messages and, in lower case, in the name of its log file."""
    module: ClassVar[str]
    """What `python -m` runs."""
    generate_path: ClassVar[str]
    """Route that takes each of `_generate_bodies`."""

    def __init__(
        self, config: EngineConfig, python: str, args: list[str], env: dict[str, str], log_dir: Path, key: str | None
    ) -> None:
        """args: the server's command line without name, host and port. key: told with every request, if any.

        Raises RecipeError for urls that are not on loopback and for a port that is taken.
        """
        self._config = config
        self._python = python
        self._args = args
        self._env = env
        self._urls = [_checked_url(url) for url in config.urls]
        self._external = bool(config.urls)
        self._log = log_dir / f"{self.label.lower()}_server.log"
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._tries = 0
        # Told to our own server, so that no other one that happens to answer on the port is taken for it.
        self._name = f"policy-{secrets.token_hex(8)}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(limits=_LIMITS, trust_env=False, verify=False, headers=self._headers)
        if "port" in config.args and not self._external:
            _require_free(int(config.args["port"]))

    # ---- what differs ----

    @abstractmethod
    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        """JSON bodies to be sent one after the other; the last one asks for spec.n responses."""

    @abstractmethod
    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        """The responses in an answer; EngineError when it is not what was asked for."""

    @abstractmethod
    def _version_text(self, url: str) -> str:
        """The weight version that the server reports."""

    @abstractmethod
    def _on_ready(self) -> None:
        """Called when the servers that were started here answer: they hold the run's policy version 0."""

    def _noise(self, line: str) -> bool:
        """Whether a line of the log says nothing."""
        return False

    # ---- the process ----

    def start(self) -> None:
        if self._external or self._process is not None:
            return
        self._launch()

    def _launch(self) -> None:
        self._tries += 1
        port = int(self._config.args.get("port", 0)) or _free_port()
        self._urls = [f"http://127.0.0.1:{port}"]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch(mode=0o600)  # the server may write its key there
        self._log_start = self._log.stat().st_size
        guard = [sys.executable, "-m", "grpo_ds.engine.guard", "--log", str(self._log), "--"]
        server = [self._python, "-m", self.module]
        # Its own session: Ctrl-C goes to the trainer alone, which then ends the engine.
        self._process = subprocess.Popen(
            [
                *(*guard, *server, *self._args),
                *("--served-model-name", self._name, "--host", "127.0.0.1", "--port", str(port)),
            ],
            stdin=subprocess.PIPE,
            env=self._env,
            start_new_session=True,
        )

    def wait_ready(self, timeout_s: float | None = None) -> None:
        timeout_s = self._config.start_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        while not all(self._healthy(url) for url in self._urls) or not self._urls:
            if not self._external:
                self._check_started()
            if time.monotonic() > deadline:
                raise self._error(
                    f"{', '.join(self._urls) or 'the server'} did not answer its health check within {timeout_s:g} s "
                    "(engine.start_timeout_s)"
                )
            time.sleep(0.1)
        if not self._external:
            self._on_ready()

    def _check_started(self) -> None:
        if self._process is None:
            raise EngineError(f"the {self.label} server was not started: call start() before wait_ready()")
        code = self._process.poll()
        if code is None:
            return
        taken = "address already in use" in self._log_tail().lower()
        if taken and "port" not in self._config.args and self._tries < _PORT_TRIES:
            self._launch()
            return
        raise self._error(f"the {self.label} server ended with exit code {code} before it was ready")

    def close(self) -> None:
        self._http.close()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # the guard's signal to end the server
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel then kills the server
            process.wait()

    def alive(self) -> bool:
        if self._external:
            return all(self._healthy(url) for url in self._urls)
        return self._process is not None and self._process.poll() is None

    def _healthy(self, url: str) -> bool:
        try:
            if self._http.get(f"{url}/health", timeout=5.0).status_code != 200:
                return False
            if self._external:
                return True
            served = self._http.get(f"{url}/v1/models", timeout=5.0)
            return served.status_code == 200 and served.json()["data"][0]["id"] == self._name
        except (httpx.TransportError, ValueError, LookupError):
            return False  # nobody answers, or somebody who is no such server

    # ---- generation ----

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[RawRollout]]:
        if not requests:
            return []
        return asyncio.run(self._generate(requests, spec))

    async def _generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[RawRollout]]:
        # verify: plain http on loopback; httpx would read the certificate bundle anew at every call.
        client_of = partial(httpx.AsyncClient, limits=_LIMITS, timeout=None, trust_env=False, verify=False)
        async with client_of(headers=self._headers) as client:
            gate = asyncio.Semaphore(_MAX_CONNECTIONS)
            try:
                async with asyncio.TaskGroup() as group:
                    watch = group.create_task(self._watch())
                    tasks = [
                        group.create_task(self._ask(client, gate, self._urls[i % len(self._urls)], request, spec))
                        for i, request in enumerate(requests)
                    ]
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                    watch.cancel()
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _watch(self) -> None:
        """Fails as soon as the own server is gone, whatever its sockets do."""
        while not self._external:
            if not self.alive():
                raise self._error(f"the {self.label} server died while it generated")
            await asyncio.sleep(0.5)

    async def _ask(
        self, client: httpx.AsyncClient, gate: asyncio.Semaphore, url: str, request: Request, spec: SamplingSpec
    ) -> list[RawRollout]:
        what = f"request {request.request_id} ({len(request.prompt_token_ids)} prompt tokens) to {url}"
        timeout_s = self._config.request_timeout_s
        bodies = self._generate_bodies(request, spec)
        async with gate:
            try:
                async with asyncio.timeout(timeout_s):
                    for body in bodies:
                        answer = await client.post(url + self.generate_path, json=body)
                        if answer.status_code != 200:
                            break
            except TimeoutError:
                raise self._error(
                    f"{what} was not answered within {timeout_s:g} s (engine.request_timeout_s)"
                ) from None
            except httpx.TransportError as error:
                raise self._error(f"{what} failed: {type(error).__name__} {error}") from error
        if answer.status_code != 200:
            raise self._error(f"{what} was refused with HTTP {answer.status_code}: {answer.text[:2000]}")
        return self._parse(answer.json(), request, spec)

    # ---- control ----

    def version(self) -> int:
        found = {url: self._version_text(url) for url in self._urls}
        versions = set(found.values())
        if len(versions) != 1:
            raise self._error(f"the servers hold different policy versions: {found}")
        return parse_version(versions.pop())

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, httpx.Response]:
        """POST to every server; returns their answers by url."""
        return {url: self._call("POST", url, path, body) for url in self._urls}

    def _call(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        answer = self._send(method, url, path, body)
        if answer.status_code != 200:
            raise self._error(f"{method} {url}{path} was refused with HTTP {answer.status_code}: {answer.text[:2000]}")
        return answer

    def _send(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return self._http.request(method, url + path, json=body, timeout=_CONTROL_TIMEOUT_S)
        except httpx.TransportError as error:
            raise self._error(f"{method} {url}{path} failed: {type(error).__name__} {error}") from error

    # ---- errors ----

    def _error(self, message: str) -> EngineError:
        if self._external:
            return EngineError(message)
        return EngineError(f"{message}\n--- end of {self._log} ---\n{self._log_tail()}")

    def _log_tail(self) -> str:
        if not self._log.exists():
            return "(no log was written)"
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if not self._noise(line))


def server_env(forced: dict[str, str], defaults: dict[str, str]) -> dict[str, str]:
    """The trainer's environment without what torchrun put there, which would make engines join the trainer's group.

    `forced` wins over it, and it wins over `defaults`.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in torchrun and not k.startswith(("MASTER_", "TORCHELASTIC_"))}
    root = str(Path(grpo_ds.__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    # More threads spin at each other's cost when cores are shared with the trainer.
    return {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"} | defaults | env | forced


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in _LOOPBACK:
        raise RecipeError(
            f"engine.urls contains {url!r}: only http:// on 127.0.0.1, localhost or [::1] is allowed, because the "
            "update routes have no password; reach another machine through a tunnel"
        )
    return url.rstrip("/")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RecipeError(
                f"engine.args.port is {port}, which cannot be used ({error.strerror}): give another port, or none"
            ) from error
