"""Who waits for the engine: the collector itself (sync.mode drain), or threads beside the trainer (keep and abort).

With keep and abort each generation batch has a thread a purpose that waits in `generate`; the engine tells of every
answer as it comes, and the collector takes what is there, once a second or as soon as it is enough. Requests have the
engine's deadlines; a failure is raised on the main thread, at the next look.

Bytes: nothing leaves the node but, with engine.max_restarts, a flag a rank and look. What is in flight lives in the
engine: 64 prompts x 16 responses of a node are 64 open connections here, and one thread.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field

from grpo_ds.collect import Answer
from grpo_ds.engine.base import EngineError, RawRollout, Request
from grpo_ds.evaluate import EngineSampler, Sampler
from grpo_ds.types import Prompt

TICK_S = 1.0
"""Longest time between two looks at what is answered; the other nodes wait for the slowest look."""
_ABORT_S = 20.0
"""Seconds in which answers must have come once the engine aborted them."""
_CLOSE_S = 5.0
"""Seconds in which the threads must have ended once their engine is closed."""


def purposes(greedy_baseline: bool) -> tuple[str, ...]:
    """What each prompt is asked for; the single greedy response first, since all of them are waited for."""
    return ("greedy", "train") if greedy_baseline else ("train",)


class Foreground:
    """Asks and waits until every response has come; implements `grpo_ds.collect.Generation`."""

    def __init__(self, sampler: Sampler, *, greedy_baseline: bool = False) -> None:
        self._sampler = sampler
        self._purposes = purposes(greedy_baseline)
        self._asked: list[Prompt] = []
        self._round = 0

    def ask(self, prompts: list[Prompt], round_index: int) -> None:
        """The next call of `answers` answers them all."""
        self._asked, self._round = self._asked + prompts, round_index

    def answers(self, enough: int) -> list[Answer]:
        """All that was asked, however many are enough."""
        prompts, self._asked = self._asked, []
        rows = {purpose: self._sampler(prompts, purpose, self._round) for purpose in reversed(self._purposes)}
        greedy = rows.get("greedy", [None] * len(prompts))
        return [Answer(*row) for row in zip(prompts, rows["train"], greedy, strict=True)]

    def abort(self) -> None:
        """Nothing is in flight between calls."""

    def settle(self) -> None:
        """See `abort`."""

    def close(self) -> None:
        """See `abort`."""


@dataclass
class _Asked:
    prompt: Prompt
    raws: dict[str, list[RawRollout]] = field(default_factory=dict)
    """Answers by purpose."""


class InFlight:
    """Requests that run beside the trainer; implements `grpo_ds.collect.Generation`.

    Made on every rank; only those whose sampler has an engine are given prompts.
    """

    def __init__(self, sampler: EngineSampler, *, greedy_baseline: bool = False) -> None:
        self._sampler = sampler
        self._purposes = purposes(greedy_baseline)
        self._changed = threading.Condition()
        """Guards what follows."""
        self._open: dict[int, _Asked] = {}
        self._done: list[_Asked] = []
        self._failure: Exception | None = None
        self._threads: list[threading.Thread] = []

    def ask(self, prompts: list[Prompt], round_index: int) -> None:
        """Returns at once."""
        if not prompts:
            return
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        with self._changed:
            self._open |= {prompt.index: _Asked(prompt) for prompt in prompts}
        for purpose in self._purposes:
            arguments = (prompts, purpose, round_index)
            # A daemon: a hung server must not keep the process from ending.
            self._threads.append(threading.Thread(target=self._run, args=arguments, daemon=True, name="in-flight"))
            self._threads[-1].start()

    def _run(self, prompts: list[Prompt], purpose: str, round_index: int) -> None:
        requests = self._sampler.requests(prompts, purpose, round_index)
        index = {request.request_id: k for k, request in requests.items()}

        def on_answer(request: Request, raws: list[RawRollout]) -> None:
            self._answered(index[request.request_id], purpose, raws)

        try:
            assert self._sampler.engine is not None
            self._sampler.engine.generate(list(requests.values()), self._sampler.spec(purpose), on_answer)
        except Exception as error:  # raised in `_wait`, where somebody listens
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _answered(self, index: int, purpose: str, raws: list[RawRollout]) -> None:
        with self._changed:
            asked = self._open[index]
            asked.raws[purpose] = raws
            if len(asked.raws) == len(self._purposes):
                self._done.append(self._open.pop(index))
            self._changed.notify_all()

    def answers(self, enough: int) -> list[Answer]:
        """Takes what is answered, after waiting for `enough` of it, for a second at most. Every rank calls it."""
        self._mend()
        self._wait(enough, TICK_S)
        with self._changed:
            done, self._done = self._done, []
        return [self._answer(asked) for asked in done]

    def settle(self) -> None:
        """Waits until nothing is in flight on any node; `answers` gives it out later. Every rank calls it."""
        while True:
            self._mend()
            self._wait(len(self._open) + len(self._done), TICK_S)
            if not any(self._sampler.ranks.all_gather(len(self._open), "requests in flight")):
                return

    def abort(self) -> None:
        """Has the engine end what is in flight; `answers` then tells which prompts have no whole answer."""
        if not self._open or self._sampler.engine is None:
            return
        self._sampler.engine.abort()
        self._wait(len(self._open) + len(self._done), _ABORT_S)
        if self._open:
            raise EngineError(f"{len(self._open)} aborted requests were not answered within {_ABORT_S:g} s")

    def close(self) -> None:
        """Waits for the end of the threads, whose engine is closed already."""
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if left := sum(thread.is_alive() for thread in self._threads):
            sys.stderr.write(f"grpo_ds: {left} threads still wait for a closed engine after {_CLOSE_S:g} s\n")

    def _mend(self) -> None:
        """An engine that was restarted gets the weights from all ranks; its requests then go on by themselves."""
        s = self._sampler
        if s.republish and any(s.ranks.all_gather(s.needs_weights(), "engine states")):
            s.republish()

    def _wait(self, enough: int, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._done) >= enough or not self._open, timeout_s)
            if self._failure:
                raise self._failure

    def _answer(self, asked: _Asked) -> Answer:
        if any(raw.finish_reason == "abort" for raws in asked.raws.values() for raw in raws):
            tokens = sum(len(raw.token_ids) for raws in asked.raws.values() for raw in raws)
            return Answer(asked.prompt, aborted_tokens=tokens)
        rollouts = {purpose: [self._sampler.rollout(raw) for raw in raws] for purpose, raws in asked.raws.items()}
        return Answer(asked.prompt, rollouts["train"], rollouts.get("greedy"))
