"""What every generation engine offers: token ids in, token ids and log-probabilities out, and weight updates.

A weight update is one transaction: `pause`, `begin_update`, `update_bucket` for each bucket, `finish_update(version)`,
`flush_cache`, `resume`. A bucket is a JSON manifest of tensors in memory of the trainer (see `grpo_ds.sync.receive`);
the engine keeps nothing of that memory once `update_bucket` returned, so the trainer may overwrite it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grpo_ds.types import FinishReason, VersionSpan

UNKNOWN_VERSION = -1
"""Policy version of an engine whose weights did not come from this run (a server the user started)."""

KEY_VARIABLE = "GRPO_DS_ENGINE_KEY"
"""Environment variable that tells a server its API key: every user of the machine could read a command line."""


class EngineError(RuntimeError):
    """The engine failed; the message says what was asked of whom, and ends with the server's log where there is one."""


class EngineDown(EngineError):
    """No server is left that holds the weights, though some will be restarted: publish them, then ask for the rest."""

    def __init__(self, message: str, finished: dict[str, list[RawRollout]]) -> None:
        super().__init__(message)
        self.finished = finished
        """What was answered before, by request_id."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How to sample; one for all requests of a call."""

    n: int
    """Responses a prompt."""
    max_tokens: int
    """Longest response, in tokens."""
    temperature: float = 1.0
    """0: the most likely token at each position; log-probabilities are then those of temperature 1."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, beside the model's own end-of-sequence tokens."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(f"n ({self.n}) and max_tokens ({self.max_tokens}) must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"temperature, top_p or top_k is out of range in {self}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature 0 gives n={self.n} equal responses: take n=1")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer."""

    prompt_token_ids: tuple[int, ...]
    seed: int
    """Response k of a prompt depends on the weights, the prompt and (seed, k) only."""
    request_id: str
    """Unique among the requests of a call; named in errors."""


@dataclass(frozen=True, slots=True)
class RawRollout:
    """One sampled response, not decoded; fields as in `grpo_ds.types.Rollout`."""

    token_ids: tuple[int, ...]
    """R sampled tokens, the stop token included when the model ended by itself."""
    logprobs: tuple[float, ...]
    """R log-probabilities, after temperature, top-k and top-p."""
    finish_reason: FinishReason
    spans: tuple[VersionSpan, ...]
    """Which policy version made which tokens; the spans cover [0, R)."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the run tells its engine, beside `EngineConfig`."""

    model_path: str
    dtype: str
    """float32 or bfloat16."""
    max_model_len: int
    """Longest prompt + response, in tokens."""
    log_dir: Path
    device: str
    """cpu or cuda."""
    seed: int
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a server; null: the trainer's own."""
    url: str | None = None
    """A server that runs already, to be joined instead of starting one."""
    trust_remote_code: bool = False
    """Whether code in the model's folder may be run."""


OnAnswer = Callable[[Request, list[RawRollout]], None]
"""Told of an answer; must not raise."""


class Channel(Protocol):
    """The trainer's way to the worker processes of one server that shares no memory with it."""

    def carry(self, bucket: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """The manifest that the server must be sent, inside the block, for its workers to get the bucket's bytes."""

    def close(self) -> None:
        """Leave the workers."""


class Carrier(Protocol):
    """Opens a channel to any server."""

    def open(self, server: str, workers: int) -> Channel:
        """A channel to the server at this URL, which has so many worker processes."""


class GenerationEngine(Protocol):
    """One node's generation engine. Every method raises EngineError when the engine fails or misses a deadline."""

    def start(self) -> None:
        """Begin to start the engine and return at once."""

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Block until the engine answers, for at most timeout_s seconds (None: engine.start_timeout_s)."""

    def close(self) -> None:
        """End the engine and everything it started. May be called more than once."""

    def alive(self) -> bool:
        """False when the engine is known to be gone; nobody is asked."""

    def generate(
        self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None
    ) -> list[list[RawRollout]]:
        """Sample spec.n responses for each request; indexed [request][k], in the order of `requests`.

        on_answer: called with each request as soon as it is answered, from any thread. Calls may run side by side and
        last over weight updates.
        """

    def abort(self) -> None:
        """End every request in flight; each is answered at once with the tokens it has, finish reason "abort".

        Returns when they are answered. A response may have no token and then has no version span. Requests made
        afterwards are served as always.
        """

    def sleep(self) -> int:
        """Give back the accelerator's memory until the next weight update; no request may be in flight.

        Returns how many servers sleep now: one that is down, or fails at this, may be restarted instead.
        The update's `pause` takes the weights' memory again, and its `resume` the key/value cache's.
        """

    def pause(self) -> None:
        """Stop generating; requests in flight wait for `resume` and go on under the new weights, as do those made
        meanwhile."""

    def begin_update(self, names: Sequence[str]) -> None:
        """Open a weight update that will carry these tensors (Hugging Face names; a tied output head may be left out).

        It must carry the whole model: parts of a fused layer alone would leave the rest of that layer undefined. An
        update that failed half-way is repaired by opening and completing the next one.
        """

    def update_bucket(self, bucket: dict[str, Any], carrier: Carrier | None = None) -> None:
        """Load the tensors of one bucket; `bucket` is the manifest described in `grpo_ds.sync.receive`.

        carrier: brings the bytes to servers that do not share the trainer's memory; null: they do.
        """

    def finish_update(self, version: int) -> None:
        """Close the update: from here on the weights are policy `version`. Fails while a listed name is missing."""

    def flush_cache(self) -> None:
        """Forget all keys and values computed with older weights."""

    def resume(self) -> None:
        """Generate again."""

    def version(self) -> int:
        """The policy version of the weights; 0 after start, UNKNOWN_VERSION for a server not updated by this run."""


class ServerLike(GenerationEngine, Protocol):
    """An engine that an `EnginePool` can share its requests out to."""

    def submit(self, request: Request, spec: SamplingSpec) -> Future[list[RawRollout]]:
        """Begin to answer one request and return at once; the future gets spec.n responses, or EngineError."""


def stream_seed(seed: int) -> int:
    """Seed of response 0 of a request; response k takes the returned value + k.

    Hashing keeps requests with neighbouring seeds from sharing random streams. The result lies in [0, 2**56).
    """
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=7).digest(), "big")


def parse_version(text: str) -> int:
    """A server's own weight version as a policy version."""
    return int(text) if text.isdecimal() else UNKNOWN_VERSION
