"""A slow engine for debugging: a second copy of the model in the trainer's process, sampled with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import (
    Carrier,
    EngineError,
    EngineSettings,
    OnAnswer,
    RawRollout,
    Request,
    SamplingSpec,
    stream_seed,
)
from grpo_ds.engine.flights import Flights
from grpo_ds.sync.receive import BucketReader, NameLedger
from grpo_ds.types import FinishReason, VersionSpan

_ABORT_TIMEOUT_S = 60.0


class HfEngine:
    """Samples one prompt at a time, its n responses as one batch; implements `GenerationEngine`."""

    def __init__(self, config: EngineConfig, settings: EngineSettings) -> None:
        """Raises RecipeError for settings that only a server understands."""
        if config.args or config.urls:
            raise RecipeError("engine.args and engine.urls mean nothing to engine.kind hf: remove them")
        self._path = settings.model_path
        self._dtype = getattr(torch, settings.dtype)
        self._max_model_len = settings.max_model_len
        self._device = settings.device
        self._trust: dict[str, Any] = {"trust_remote_code": True} if settings.trust_remote_code else {}
        self._model: Any = None
        self._eos: frozenset[int] = frozenset()
        self._version = 0
        self._reader = BucketReader()
        self._ledger: NameLedger | None = None
        self._usable = True
        self._flights = Flights()

    def start(self) -> None:
        if self._model is not None:
            return
        model = AutoModelForCausalLM.from_pretrained(self._path, dtype=self._dtype, **self._trust)
        self._model = model.to(self._device).eval()
        listed = model.generation_config.eos_token_id
        own = AutoTokenizer.from_pretrained(self._path, **self._trust).eos_token_id
        ids = [own, *(listed if isinstance(listed, list) else [listed])]
        self._eos = frozenset(token for token in ids if token is not None)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        self._require_started()

    def close(self) -> None:
        self._model = None
        self._reader.close()

    def alive(self) -> bool:
        return self._model is not None

    def _require_started(self) -> None:
        if self._model is None:
            raise EngineError("the hf engine holds no model: call start() first, and nothing after close()")

    # ---- generation ----

    def generate(
        self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None
    ) -> list[list[RawRollout]]:
        self._require_started()
        if not self._usable:
            raise EngineError("the hf engine's last weight update was not finished: its weights are a mixture")
        rows, flight = [], self._flights.take_off()
        try:
            for request in requests:
                rows.append(self._answer(request, spec, flight))
                if on_answer:
                    on_answer(request, rows[-1])
        finally:
            self._flights.land(flight)
        return rows

    def abort(self) -> None:
        self._flights.abort()
        if not self._flights.wait_aborted(_ABORT_TIMEOUT_S):
            raise EngineError(f"aborted requests were not answered within {_ABORT_TIMEOUT_S:g} s")

    @torch.no_grad()
    def _answer(self, request: Request, spec: SamplingSpec, flight: int) -> list[RawRollout]:
        prompt = request.prompt_token_ids
        limit = min(spec.max_tokens, self._max_model_len - len(prompt))
        if limit < 1:
            raise EngineError(
                f"request {request.request_id} has {len(prompt)} prompt tokens, which leaves no room for a response "
                f"in max_model_len {self._max_model_len}"
            )
        stops = self._eos | set(spec.stop_token_ids)
        streams = [torch.Generator().manual_seed(stream_seed(request.seed) + k) for k in range(spec.n)]
        tokens: list[list[int]] = [[] for _ in range(spec.n)]
        logprobs: list[list[float]] = [[] for _ in range(spec.n)]
        running = set(range(spec.n))
        inputs, cache = torch.tensor([prompt] * spec.n, device=self._device), None
        for _ in range(limit):
            if self._flights.aborted(flight):
                break
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            distribution = processed_logprobs(output.logits[:, -1].float().cpu(), spec)
            chosen = [_draw(distribution[k], streams[k], spec) for k in range(spec.n)]
            for k in list(running):
                tokens[k].append(chosen[k])
                logprobs[k].append(float(distribution[k, chosen[k]]))
                if chosen[k] in stops:
                    running.remove(k)
            if not running:
                break
            inputs = torch.tensor(chosen, device=self._device).unsqueeze(1)
        return [self._rollout(tokens[k], logprobs[k], limit, k in running) for k in range(spec.n)]

    def _rollout(self, tokens: list[int], logprobs: list[float], limit: int, running: bool) -> RawRollout:
        reason: FinishReason = "stop" if not running else "length" if len(tokens) == limit else "abort"
        spans = (VersionSpan(self._version, 0, len(tokens)),) if tokens else ()
        return RawRollout(tuple(tokens), tuple(logprobs), reason, spans)

    # ---- weight updates ----

    def sleep(self) -> int:
        """Not offered: the model shares the trainer's process."""
        raise EngineError("engine.sleep means nothing to engine.kind hf")

    def pause(self) -> None:
        """Nothing is in flight between calls."""

    def begin_update(self, names: Sequence[str]) -> None:
        self._require_started()
        own = {name for name, _ in self._model.named_parameters()}
        if lacking := own - set(names):
            raise EngineError(f"the weight update leaves out {len(lacking)} parameters, e.g. {min(lacking)}")
        self._ledger = NameLedger(names)
        self._usable = False

    @torch.no_grad()
    def update_bucket(self, bucket: dict[str, Any], carrier: Carrier | None = None) -> None:
        if self._ledger is None:
            raise EngineError("update_bucket comes after begin_update")
        known = dict(self._model.named_parameters(remove_duplicate=False))
        try:
            self._ledger.check(entry["name"] for entry in bucket["tensors"])
            for name, tensor in self._reader.tensors(bucket):
                if name not in known or known[name].shape != tensor.shape:
                    raise ValueError(f"the model has no parameter {name} of shape {tuple(tensor.shape)}")
                known[name].copy_(tensor)
                self._ledger.arrived([name])
        except (ValueError, OSError) as error:
            raise EngineError(f"a weight bucket could not be loaded: {error}") from error

    def finish_update(self, version: int) -> None:
        if self._ledger is None:
            raise EngineError("finish_update comes after begin_update")
        try:
            self._ledger.require_complete()
        except ValueError as error:
            raise EngineError(str(error)) from error
        self._ledger, self._version, self._usable = None, version, True

    def flush_cache(self) -> None:
        """No key or value outlives a call of `generate`."""

    def resume(self) -> None:
        """See `pause`."""

    def version(self) -> int:
        return self._version


def processed_logprobs(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """Log-probabilities the next token is drawn from: temperature, then top-k, then top-p, renormalised.

    logits: (N, V) float32; returns (N, V), -inf for tokens left out. Temperature 0 counts as 1. Top-p keeps the fewest
    most likely tokens whose probabilities sum to at least top_p (Holtzman et al. 2020, arXiv:1904.09751).
    """
    scaled = logits / (spec.temperature or 1.0)
    if 0 < spec.top_k < scaled.shape[-1]:
        kth = scaled.topk(spec.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    if spec.top_p < 1:
        ordered, order = scaled.softmax(-1).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= spec.top_p
        scaled = scaled.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return scaled.log_softmax(-1)


def _draw(logprobs: Tensor, stream: torch.Generator, spec: SamplingSpec) -> int:
    if spec.temperature == 0:
        return int(logprobs.argmax())
    return int(torch.multinomial(logprobs.exp(), 1, generator=stream))
