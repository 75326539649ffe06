"""What the engines with a server process of their own share: HTTP to one server that runs here or elsewhere.

Bytes a server, 70B, 64 nodes, 32k tokens, 64 prompts x 16 samples a node and round: prompts and responses are token
ids and log-probabilities as JSON, about 20 bytes a token, so 0.7 GB a round on loopback; weights never pass here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
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
from grpo_ds.engine.http import Http, Unreachable, connections
from grpo_ds.engine.key import shared_key
from grpo_ds.engine.process import ServerProcess
from grpo_ds.engine.servers import RUBBISH, JoinedServer, OwnServer, Server, ServerKind, shown

_ABORT_TIMEOUT_S = 60.0
_ABORT_AGAIN_S = 0.2
"""Seconds after which an abort is repeated: a request may reach the server just after the one before."""


class ServerEngine(ABC):
    """Starts a server on loopback (or, with settings.url, joins one); the part of `ServerLike` that is HTTP.

    A server that is started here answers only who knows its key. One that is joined may lie on another host when it
    demands the key of the environment (`grpo_ds.engine.key`).
    """

    kind: ClassVar[ServerKind]
    generate_path: ClassVar[str]
    """Route that takes each of `_generate_bodies`."""

    def __init__(
        self, config: EngineConfig, settings: EngineSettings, python: str, args: list[str], env: dict[str, str]
    ) -> None:
        """args: the server's command line without name, host and port. env: what its environment has to contain.

        Raises RecipeError for a key that could be guessed and a port that is taken.
        """
        self._config = config
        self._server: Server
        if settings.url is not None:
            self._http = Http(shared_key(), secure=settings.url.startswith("https:"))
            self._server = JoinedServer(self.kind, self._http, settings.url)
        else:
            key = secrets.token_hex(16)
            self._http = Http(key)
            self._server = self._own_server(settings, key, [python, "-m", self.kind.module, *args], env)
        self._gate = asyncio.Semaphore(connections(1))
        self._flights = Flights()
        self._asking: set[asyncio.Task[Any]] = set()
        self._watch: Future[None] | None = None
        self._carrier: Carrier | None = None
        self._channel: Channel | None = None
        """Of `_carrier`, whose memory and deadline it has."""
        self._asleep = False

    def _own_server(self, settings: EngineSettings, key: str, command: list[str], env: dict[str, str]) -> OwnServer:
        # Told to our own server, so that no other one that happens to answer on the port is taken for it.
        name = f"policy-{secrets.token_hex(8)}"
        command = [*command, "--served-model-name", name, "--host", "127.0.0.1"]
        # gloo's: the server's processes are all on this machine, whatever leads from the trainer to other nodes.
        env = env | {KEY_VARIABLE: key, "GLOO_SOCKET_IFNAME": "lo"}
        if settings.visible_devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = settings.visible_devices
        process = ServerProcess(
            self.kind.label,
            lambda port: [*command, "--port", str(port)],
            env,
            settings.log_dir / f"{self.kind.label.lower()}_server.log",
            int(self._config.args["port"]) if "port" in self._config.args else None,
            self._noise,
        )
        return OwnServer(self.kind, self._http, process, name)

    # ---- what differs ----

    @abstractmethod
    def _generate_bodies(self, request: Request, spec: SamplingSpec) -> list[dict[str, Any]]:
        """JSON bodies to be sent one after the other; the last one asks for spec.n responses."""

    @abstractmethod
    def _parse(self, answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        """The responses in an answer; EngineError when it is not what was asked for."""

    @abstractmethod
    def _abort(self, timeout_s: float) -> None:
        """Have the server end all its requests; EngineError when it does not answer within timeout_s seconds."""

    @abstractmethod
    def _version_text(self) -> str:
        """The weight version that the server reports; the process that computes must have been asked."""

    @abstractmethod
    def _on_ready(self) -> None:
        """Called when a server that was started here answers: it holds the run's policy version 0."""

    @abstractmethod
    def _pause(self) -> None:
        """As `pause` of `GenerationEngine`."""

    @abstractmethod
    def _resume(self) -> None:
        """As `resume` of `GenerationEngine`."""

    @abstractmethod
    def _workers(self) -> int:
        """Processes of the server that hold weights."""

    @abstractmethod
    def _load(self, bucket: dict[str, Any]) -> None:
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

    # ---- the server ----

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._server.url

    def start(self) -> None:
        self._server.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        self._server.wait_ready(self._config.start_timeout_s if timeout_s is None else timeout_s)
        if isinstance(self._server, OwnServer):
            self._on_ready()

    def alive(self) -> bool:
        return self._server.alive()

    def close(self) -> None:
        try:
            self._http.close()
            if self._channel:
                self._channel.close()
        finally:
            self._server.close()

    # ---- generation ----

    def generate(
        self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None
    ) -> list[list[RawRollout]]:
        """As in `GenerationEngine`. Each request has its own deadline (engine.request_timeout_s); when one fails, the
        others run on, and nobody is told of their answers but on_answer."""
        futures = [self._begin(request, spec, on_answer) for request in requests]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()  # raises
        return [future.result() for future in futures]

    def submit(self, request: Request, spec: SamplingSpec) -> Future[list[RawRollout]]:
        return self._begin(request, spec, None)

    def _begin(self, request: Request, spec: SamplingSpec, on_answer: OnAnswer | None) -> Future[list[RawRollout]]:
        if self._asleep:
            raise EngineError(f"the {self.kind.label} engine sleeps since its last generation: publish weights first")
        flight = self._flights.take_off()
        try:
            self._watch = self._watch or self._http.beside(self._until_gone())
            return self._http.beside(self._answer(request, spec, flight, on_answer))
        except Unreachable as error:
            self._flights.land(flight)
            raise self._error(f"request {request.request_id} was not sent: {error}") from error

    async def _answer(
        self, request: Request, spec: SamplingSpec, flight: int, on_answer: OnAnswer | None
    ) -> list[RawRollout]:
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            async with self._gate:
                rollouts = await self._ask(flight, request, spec)
            if on_answer:
                on_answer(request, rollouts)
            return rollouts
        except asyncio.CancelledError:
            fate = "was closed" if self.alive() else "died"
            raise self._error(f"the {self.kind.label} server {fate} while it generated") from None
        finally:
            self._asking.discard(task)
            self._flights.land(flight)

    async def _until_gone(self) -> None:
        """Ends all requests as soon as the own server is gone, whatever its sockets do."""
        while self.alive():
            await asyncio.sleep(0.5)
        for task in self._asking:
            task.cancel()

    async def _ask(self, flight: int, request: Request, spec: SamplingSpec) -> list[RawRollout]:
        what = f"request {request.request_id} ({len(request.prompt_token_ids)} prompt tokens) to {self.url}"
        timeout_s = self._config.request_timeout_s
        bodies = self._generate_bodies(request, spec)
        try:
            async with asyncio.timeout(timeout_s):
                for body in bodies:
                    if self._flights.aborted(flight):  # what was not sent yet need not be
                        return [RawRollout((), (), "abort", ())] * spec.n
                    answer = await self._http.post(self.url + self.generate_path, body)
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
            self._abort(max(1.0, deadline - time.monotonic()))
            if self._flights.wait_aborted(_ABORT_AGAIN_S):
                return
            if time.monotonic() > deadline:
                raise self._error(f"aborted requests were not answered within {_ABORT_TIMEOUT_S:g} s")

    # ---- control ----

    def sleep(self) -> int:
        if self._flights.any():
            raise EngineError(f"the {self.kind.label} engine cannot sleep while requests are in flight")
        self._sleep()
        self._asleep = True
        return 1

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
        self._take_carrier(carrier)
        if carrier is None:
            self._load(bucket)
            return
        self._channel = self._channel or carrier.open(self.url, self._workers())
        with self._channel.carry(bucket) as told:
            self._load(told)

    def _take_carrier(self, carrier: Carrier | None) -> None:
        """Leaves the channel of another carrier: it leads to its memory, and workers are in one group at a time."""
        if carrier is not self._carrier:
            if self._channel:
                self._channel.close()
            self._carrier, self._channel = carrier, None

    def version(self) -> int:
        return parse_version(self._version_text())

    def _error(self, message: str) -> EngineError:
        return self._server.error(message)
