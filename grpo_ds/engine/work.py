"""The requests of one call, shared by several replicas: each is answered once, whatever happens to who took it."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from typing import get_args

from grpo_ds.engine.base import EngineError, OnAnswer, RawRollout, Request, SamplingSpec
from grpo_ds.types import FinishReason


class WorkQueue:
    """Who works on which request. Not locked: its owner calls it under a lock of its own."""

    def __init__(self, requests: Sequence[Request], spec: SamplingSpec, on_answer: OnAnswer | None = None) -> None:
        """Raises ValueError for two requests of the same id."""
        self.spec = spec
        self.on_answer = on_answer
        self._requests = {request.request_id: request for request in requests}
        if len(self._requests) != len(requests):
            raise ValueError("two requests of one call have the same request_id")
        self._waiting = deque(self._requests)
        self._takers: dict[str, Hashable] = {}
        self._answers: dict[str, list[RawRollout]] = {}
        self._held: Counter[Hashable] = Counter()
        self.aborted = False

    def __len__(self) -> int:
        return len(self._requests)

    def take(self, taker: Hashable) -> Request | None:
        """The next request, now the taker's; None while there is none."""
        if not self._waiting:
            return None
        name = self._waiting.popleft()
        self._takers[name] = taker
        self._held[taker] += 1
        return self._requests[name]

    def held(self, taker: Hashable) -> int:
        """Requests that the taker has and has not answered."""
        return self._held[taker]

    def answer(self, taker: Hashable, request: Request, rollouts: list[RawRollout]) -> bool:
        """Keeps an answer; False, and nothing is kept, when the request was taken from the taker in the meantime."""
        if self._takers.get(request.request_id) != taker:
            return False
        del self._takers[request.request_id]
        self._held[taker] -= 1
        self._keep(request.request_id, rollouts)
        return True

    def hand_back(self, taker: Hashable) -> int:
        """Makes the taker's unanswered requests the next ones again; returns how many will be asked once more."""
        names = [name for name, holder in self._takers.items() if holder == taker]
        for name in reversed(names):
            del self._takers[name]
            self._waiting.appendleft(name)
        del self._held[taker]
        if self.aborted:
            self.abort()
            return 0
        return len(names)

    def abort(self) -> None:
        """Answers what nobody has taken, now or later, with responses that have no token."""
        self.aborted = True
        while self._waiting:
            self._keep(self._waiting.popleft(), [RawRollout((), (), "abort", ())] * self.spec.n)

    def _keep(self, name: str, rollouts: list[RawRollout]) -> None:
        self._answers[name] = rollouts
        if self.on_answer:
            self.on_answer(self._requests[name], rollouts)

    @property
    def complete(self) -> bool:
        """Whether every request is answered."""
        return len(self._answers) == len(self._requests)

    @property
    def finished(self) -> dict[str, list[RawRollout]]:
        """The answers so far by request_id."""
        return dict(self._answers)

    def in_order(self) -> list[list[RawRollout]]:
        """All answers, in the order of the requests."""
        return [self._answers[name] for name in self._requests]


def check_answer(
    request: Request, rollouts: list[RawRollout], spec: SamplingSpec, oldest: int, newest: int, *, aborted: bool = False
) -> None:
    """Raises EngineError unless these are spec.n whole responses made by policies `oldest` to `newest`.

    aborted: the engine was told to abort, so a response may be cut off and have no token. A server whose core is ended
    from outside also answers with what it has, as do requests that somebody else aborted: such text is no sample.
    """
    if len(rollouts) != spec.n:
        raise EngineError(f"request {request.request_id} asked for {spec.n} responses and got {len(rollouts)}")
    if not aborted and any(rollout.finish_reason == "abort" for rollout in rollouts):
        raise EngineError(f"request {request.request_id} was aborted at the server by somebody else")
    for k, rollout in enumerate(rollouts):
        tokens, logprobs = rollout.token_ids, rollout.logprobs
        covered = [position for span in rollout.spans for position in range(span.start, span.end)]
        begun = len(tokens) > 0 or (aborted and rollout.finish_reason == "abort")
        whole = begun and len(tokens) <= spec.max_tokens and len(logprobs) == len(tokens)
        whole = whole and all(math.isfinite(value) for value in logprobs)
        whole = whole and covered == list(range(len(tokens))) and rollout.finish_reason in get_args(FinishReason)
        if not whole:
            raise EngineError(
                f"response {k} of request {request.request_id} is not whole: {len(tokens)} tokens, {len(logprobs)} "
                f"log-probabilities, version spans {rollout.spans}, finish reason {rollout.finish_reason!r}"
            )
        if wrong := {span.version for span in rollout.spans if not oldest <= span.version <= newest}:
            raise EngineError(
                f"response {k} of request {request.request_id} was made by policy {min(wrong)}, not by {oldest}"
                + (f" to {newest}" if newest > oldest else "")
            )
