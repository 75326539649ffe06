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

from grpo_ds.config import EngineConfig
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
from grpo_ds.engine.http import Http, Post, Unreachable
from grpo_ds.engine.key import checked_urls, shared_key
from grpo_ds.engine.process import ServerProcess
from grpo_ds.engine.servers import RUBBISH, JoinedServers, OwnServer, ServerKind, Servers, shown

_MAX_CONNECTIONS = 256
_ABORT_TIMEOUT_S = 60.0
_ABORT_AGAIN_S = 0.2
"""Seconds after which an abort is repeated: a request may reach the server just after the one before."""


class ServerEngine(ABC):
    """Starts a server on loopback (or, with engine.urls, joins others); the part of `GenerationEngine` that is HTTP.

    Requests are spread over the servers round-robin; everything else goes to each of them. A server that is started
    here answers only who knows its key. One that is joined may lie on another host when it demands the key of the
    environment (`grpo_ds.engine.key`).
    """

    kind: ClassVar[ServerKind]
    generate_path: ClassVar[str]
    """Route that takes each of `_generate_bodies`."""

    def __init__(
        self, config: EngineConfig, settings: EngineSettings, python: str, args: list[str], env: dict[str, str]
    ) -> None:
        """args: the server's command line without name, host and port. env: what its environment has to contain.

        Raises RecipeError for a url that may not be joined, a key that could be guessed and a port that is taken.
        """
        self._config = config
        key = shared_key() if config.urls else secrets.token_hex(16)
        self._http = Http(key)
        self._servers: Servers
        if config.urls:
            self._servers = JoinedServers(self.kind, self._http, checked_urls(config.urls, key))
        else:
            # Told to our own server, so that no other one that happens to answer on the port is taken for it.
            name = f"policy-{secrets.token_hex(8)}"
            command = [python, "-m", self.kind.module, *args, "--served-model-name", name, "--host", "127.0.0.1"]
            # gloo's: the server's processes are all on this machine, whatever leads from the trainer to other nodes.
            env = env | {KEY_VARIABLE: str(key), "GLOO_SOCKET_IFNAME": "lo"}
            if settings.visible_devices is not None:
                env["CUDA_VISIBLE_DEVICES"] = settings.visible_devices
            process = ServerProcess(
                self.kind.label,
                lambda port: [*command, "--port", str(port)],
                env,
                settings.log_dir / f"{self.kind.label.lower()}_server.log",
                int(config.args["port"]) if "port" in config.args else None,
                self._noise,
            )
            self._servers = OwnServer(self.kind, self._http, process, name)
        self._flights = Flights()
        self._carrier: Carrier | None = None
        self._channels: dict[str, Channel] = {}
        """By server; all of `_carrier`, whose memory and deadline they have."""
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
    def _urls(self) -> Sequence[str]:
        return self._servers.urls

    def start(self) -> None:
        self._servers.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        self._servers.wait_ready(self._config.start_timeout_s if timeout_s is None else timeout_s)
        if not self._config.urls:
            self._on_ready()

    def alive(self) -> bool:
        return self._servers.alive()

    def close(self) -> None:
        self._http.close()
        for channel in self._channels.values():
            channel.close()
        self._servers.close()

    # ---- generation ----

    def generate(
        self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None
    ) -> list[list[RawRollout]]:
        if not requests:
            return []
        if self._asleep:
            raise EngineError(f"the {self.kind.label} engine sleeps since its last generation: publish weights first")
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
        while not self._servers.died():
            await asyncio.sleep(0.5)
        raise self._error(f"the {self.kind.label} server died while it generated")

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
        try:
            return self._parse(answer.json(), request, spec)
        except RUBBISH as error:
            raise self._error(f"{what} was answered with rubbish, {shown(answer, error)}") from error

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
            raise EngineError(f"the {self.kind.label} engine cannot sleep while requests are in flight")
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

    def _take_carrier(self, carrier: Carrier | None) -> None:
        """Leaves the channels of another carrier: they lead to its memory, and workers are in one group at a time."""
        if carrier is not self._carrier:
            for channel in self._channels.values():
                channel.close()
            self._carrier, self._channels = carrier, {}

    def update_bucket(self, bucket: dict[str, Any], carrier: Carrier | None = None) -> None:
        self._take_carrier(carrier)

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

    def _error(self, message: str) -> EngineError:
        return self._servers.error(message)
