"""What the engines with a server process of their own share: HTTP to servers that run here or elsewhere.

Bytes a server, 70B, 64 nodes, 32k tokens, 64 prompts x 16 samples a node and round: prompts and responses are token
ids and log-probabilities as JSON, about 20 bytes a token, so 0.7 GB a round on loopback; weights never pass here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import (
    KEY_VARIABLE,
    Carrier,
    Channel,
    EngineError,
    EngineSettings,
    OnAnswer,
    RawRollout,
    Request,
    SamplingSpec,
    parse_version,
)
from grpo_ds.engine.flights import Flights
from grpo_ds.engine.http import Answer, Http, Post, Unreachable
from grpo_ds.engine.key import checked_url, on_loopback, shared_key
from grpo_ds.engine.process import ServerProcess

_MAX_CONNECTIONS = 256
_HEALTH_TIMEOUT_S = 5.0
_CONTROL_TIMEOUT_S = 600.0
"""Deadline of one step of a weight update; the trainer's own deadline for the whole update is usually shorter."""
_ABORT_TIMEOUT_S = 60.0
_ABORT_AGAIN_S = 0.2
"""Seconds after which an abort is repeated: a request may reach the server just after the one before."""


class ServerEngine(ABC):
    """Starts a server on loopback (or, with engine.urls, joins others); the part of `GenerationEngine` that is HTTP.

    Requests are spread over the servers round-robin; everything else goes to each of them. A server that is started
    here answers only who knows its key. One that is joined may lie on another host when it demands the key of the
    environment (`grpo_ds.engine.key`).
    """

    label: ClassVar[str]
    """The engine's name in messages and, in lower case, in the name of its log file."""
    module: ClassVar[str]
    """What `python -m` runs."""
    generate_path: ClassVar[str]
    """Route that takes each of `_generate_bodies`."""
    control_paths: ClassVar[tuple[str, ...]]
    """Routes that change the weights when they are posted to; an empty body is refused by all of them."""

    def __init__(
        self, config: EngineConfig, settings: EngineSettings, python: str, args: list[str], env: dict[str, str]
    ) -> None:
        """args: the server's command line without name, host and port. env: what its environment has to contain.

        Raises RecipeError for a url that may not be joined, a key that could be guessed and a port that is taken.
        """
        self._config = config
        key = shared_key() if config.urls else secrets.token_hex(16)
        self._joined = [checked_url(url, key) for url in config.urls]
        # Told to our own server, so that no other one that happens to answer on the port is taken for it.
        self._name = f"policy-{secrets.token_hex(8)}"
        self._process: ServerProcess | None = None
        if not config.urls:
            env = env | {KEY_VARIABLE: str(key)}
            if settings.visible_devices is not None:
                env["CUDA_VISIBLE_DEVICES"] = settings.visible_devices
            command = [python, "-m", self.module, *args, "--served-model-name", self._name, "--host", "127.0.0.1"]
            self._process = ServerProcess(
                self.label,
                lambda port: [*command, "--port", str(port)],
                env,
                settings.log_dir / f"{self.label.lower()}_server.log",
                int(config.args["port"]) if "port" in config.args else None,
                self._noise,
            )
        self._http = Http(key)
        self._flights = Flights()
        self._channels: dict[str, Channel] = {}
        self._guarded: set[str] = set()
        self._asleep = False

    # ---- what differs ----

    @abstractmethod
    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        """JSON bodies to be sent one after the other; the last one asks for spec.n responses."""

    @abstractmethod
    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        """The responses in an answer; EngineError when it is not what was asked for."""

    @abstractmethod
    def _abort(self, url: str) -> None:
        """Have the server end all its requests."""

    @abstractmethod
    def _version_text(self, url: str) -> str:
        """The weight version that the server reports; the process that computes must have been asked."""

    @abstractmethod
    def _on_ready(self) -> None:
        """Called when the servers that were started here answer: they hold the run's policy version 0."""

    @abstractmethod
    def _pause(self) -> None:
        """As `pause` of `GenerationEngine`."""

    @abstractmethod
    def _resume(self) -> None:
        """As `resume` of `GenerationEngine`."""

    @abstractmethod
    def _workers(self, url: str) -> int:
        """Processes of the server that hold weights."""

    @abstractmethod
    def _load(self, url: str, bucket: dict[str, Any]) -> None:
        """Have the server load the tensors of a bucket."""

    @abstractmethod
    def _sleep(self) -> None:
        """Give back the memory of weights and KV cache."""

    @abstractmethod
    def _wake(self, tag: str) -> None:
        """Take the memory of "weights" or of the "kv_cache" again."""

    def _noise(self, line: str) -> bool:
        """Whether a line of the log says nothing."""
        return False

    # ---- the servers ----

    @property
    def _urls(self) -> list[str]:
        return [self._process.url] if self._process else self._joined

    def start(self) -> None:
        if self._process:
            self._process.start()
            return
        for url in self._joined:
            try:
                self._require_guarded(url)
            except Unreachable:
                continue  # not up yet: asked again before it is used

    def wait_ready(self, timeout_s: float | None = None) -> None:
        timeout_s = self._config.start_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            if self._process:
                self._process.check()
            if all(self._healthy(url) for url in self._urls):
                break
            if time.monotonic() > deadline:
                raise self._error(
                    f"{', '.join(self._urls)} did not answer its health check within {timeout_s:g} s "
                    "(engine.start_timeout_s)"
                )
            time.sleep(0.1)
        if self._process:
            if obeyed := self._obeys_strangers(self._process.url):
                raise self._error(f"the {self.label} server that was started here obeys strangers: {obeyed}")
            self._on_ready()

    def close(self) -> None:
        self._http.close()
        for channel in self._channels.values():
            channel.close()
        if self._process:
            self._process.close()

    def alive(self) -> bool:
        if self._process:
            return self._process.alive()
        return all(self._healthy(url) for url in self._urls)

    def _healthy(self, url: str) -> bool:
        try:
            if not self._process:
                self._require_guarded(url)
            health = self._http.request("GET", f"{url}/health", None, _HEALTH_TIMEOUT_S)
            if self._process:
                served = self._http.request("GET", f"{url}/v1/models", None, _HEALTH_TIMEOUT_S)
                return {health.status_code, served.status_code} == {200} and _serves(served, self._name)
        except Unreachable:
            return False
        if health.status_code in (401, 403):
            raise RecipeError(
                f"engine.urls: {url} refuses the key in {KEY_VARIABLE}: start it and this run with the same one"
            )
        return health.status_code == 200

    def _require_guarded(self, url: str) -> None:
        """RecipeError when a joined server that other machines may reach obeys them."""
        if url in self._guarded or on_loopback(url):
            return
        if obeyed := self._obeys_strangers(url):
            raise RecipeError(
                f"engine.urls: {url} obeys strangers ({obeyed}): start it with `python -m {self.module}` and the "
                f"environment variable {KEY_VARIABLE}"
            )
        self._guarded.add(url)

    def _obeys_strangers(self, url: str) -> str | None:
        """What the server answered without the key, other than a refusal."""
        for path in self.control_paths:
            status = self._http.stranger(url + path, _HEALTH_TIMEOUT_S)
            if status not in (401, 403):
                return f"POST {path} without a key was answered with HTTP {status}"
        return None

    # ---- generation ----

    def generate(
        self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None
    ) -> list[list[RawRollout]]:
        if not requests:
            return []
        if self._asleep:
            raise EngineError(f"the {self.label} engine sleeps since its last generation: publish weights first")
        flight = self._flights.take_off()
        try:
            return asyncio.run(self._generate(requests, spec, flight, on_answer))
        finally:
            self._flights.land(flight)

    async def _generate(
        self, requests: Sequence[Request], spec: SamplingSpec, flight: int, on_answer: OnAnswer | None
    ) -> list[list[RawRollout]]:
        async with self._http.session() as post:
            gate, urls = asyncio.Semaphore(_MAX_CONNECTIONS), self._urls

            async def ask(url: str, request: Request) -> list[RawRollout]:
                async with gate:
                    rollouts = await self._ask(post, flight, url, request, spec)
                if on_answer:
                    on_answer(request, rollouts)
                return rollouts

            try:
                async with asyncio.TaskGroup() as group:
                    watch = group.create_task(self._watch())
                    tasks = [group.create_task(ask(urls[i % len(urls)], request)) for i, request in enumerate(requests)]
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                    watch.cancel()
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _watch(self) -> None:
        """Fails as soon as the own server is gone, whatever its sockets do."""
        while self._process:
            if not self._process.alive():
                raise self._error(f"the {self.label} server died while it generated")
            await asyncio.sleep(0.5)

    async def _ask(self, post: Post, flight: int, url: str, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        what = f"request {request.request_id} ({len(request.prompt_token_ids)} prompt tokens) to {url}"
        timeout_s = self._config.request_timeout_s
        bodies = self._generate_bodies(request, spec)
        try:
            async with asyncio.timeout(timeout_s):
                for body in bodies:
                    if self._flights.aborted(flight):  # what was not sent yet need not be
                        return [RawRollout((), (), "abort", ())] * spec.n
                    answer = await post(url + self.generate_path, body)
                    if answer.status_code != 200:
                        break
        except TimeoutError:
            raise self._error(f"{what} was not answered within {timeout_s:g} s (engine.request_timeout_s)") from None
        except Unreachable as error:
            raise self._error(f"{what} failed: {error}") from error
        if answer.status_code != 200:
            raise self._error(f"{what} was refused with HTTP {answer.status_code}: {answer.text[:2000]}")
        return self._parse(answer.json(), request, spec)

    def abort(self) -> None:
        self._flights.abort()
        deadline = time.monotonic() + _ABORT_TIMEOUT_S
        while True:
            for url in self._urls:
                self._abort(url)
            if self._flights.wait_aborted(_ABORT_AGAIN_S):
                return
            if time.monotonic() > deadline:
                raise self._error(f"aborted requests were not answered within {_ABORT_TIMEOUT_S:g} s")

    # ---- control ----

    def sleep(self) -> None:
        if self._flights.any():
            raise EngineError(f"the {self.label} engine cannot sleep while requests are in flight")
        self._sleep()
        self._asleep = True

    def pause(self) -> None:
        if self._asleep:
            self._wake("weights")
        self._pause()

    def resume(self) -> None:
        if self._asleep:
            self._wake("kv_cache")
            self._asleep = False
        self._resume()

    def update_bucket(self, bucket: dict[str, Any], carrier: Carrier | None = None) -> None:
        def bring(url: str) -> None:
            if carrier is None:
                self._load(url, bucket)
                return
            if url not in self._channels:
                self._channels[url] = carrier.open(url, self._workers(url))
            with self._channels[url].carry(bucket) as told:
                self._load(url, told)

        with ThreadPoolExecutor(len(self._urls)) as threads:
            list(threads.map(bring, self._urls))

    def version(self) -> int:
        found = {url: self._version_text(url) for url in self._urls}
        versions = set(found.values())
        if len(versions) != 1:
            raise self._error(f"the servers hold different policy versions: {found}")
        return parse_version(versions.pop())

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Answer]:
        """POST to every server; returns their answers by url."""
        return {url: self._call("POST", url, path, body) for url in self._urls}

    def _call(self, method: str, url: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        answer = self._send(method, url, path, body)
        if answer.status_code != 200:
            raise self._error(f"{method} {url}{path} was refused with HTTP {answer.status_code}: {answer.text[:2000]}")
        return answer

    def _send(self, method: str, url: str, path: str, body: dict[str, Any] | None) -> Answer:
        try:
            return self._http.request(method, url + path, body, _CONTROL_TIMEOUT_S)
        except Unreachable as error:
            raise self._error(f"{method} {url}{path} failed: {error}") from error

    def _error(self, message: str) -> EngineError:
        return self._process.error(message) if self._process else EngineError(message)


def _serves(models: Answer, name: str) -> bool:
    try:
        return bool(models.json()["data"][0]["id"] == name)
    except (ValueError, LookupError, TypeError):
        return False  # no such server, but somebody else on the port
