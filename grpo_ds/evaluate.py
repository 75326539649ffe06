"""Rollouts of a node's engine as the collector wants them, and the held-out evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from grpo_ds.collect import Grader
from grpo_ds.config import Recipe
from grpo_ds.dist import Ranks
from grpo_ds.engine.base import EngineDown, EngineError, GenerationEngine, RawRollout, Request, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from grpo_ds.engine.replicas import COUNTS
from grpo_ds.seeds import derive_seed
from grpo_ds.types import Prompt, Rollout

WATCH_S = 5.0
"""Seconds between two looks at whether the engine's processes live."""


class Sampler(Protocol):
    """Generates the rollouts of prompts with seeds that depend on (run seed, purpose, round, prompt) only.

    Every rank calls it at the same time, those without an engine with no prompts.
    """

    def __call__(self, prompts: list[Prompt], purpose: str, round_index: int) -> list[list[Rollout]]: ...


@dataclass(frozen=True)
class EngineSampler:
    """Samples responses on every node at once; a sample's seed depends on (train.seed, purpose, round, prompt, k) only.

    With `republish` (engine.max_restarts > 0) every rank calls it: an engine that broke gets the weights again from
    all of them.
    """

    engine: GenerationEngine | None
    """This node's engine on the rank that leads it, None elsewhere."""
    recipe: Recipe
    decode: Callable[[list[int]], str]
    ranks: Ranks
    republish: Callable[[], object] | None = None
    """Publishes the current policy version once more."""

    def __call__(self, prompts: list[Prompt], purpose: str, round_index: int) -> list[list[Rollout]]:
        """[prompt][k]; rollout.n responses to `train` on, one for `greedy`, train.heldout_n for `heldout`."""
        done: dict[int, list[Rollout]] = {}
        while True:
            done |= self._ask([p for p in prompts if p.index not in done], purpose, round_index)
            mine = [self.needs_weights(), len(done) < len(prompts)]
            rows = self.ranks.all_gather(mine, "engine states") if self.republish else [mine]
            if self.republish and any(needs or missing for needs, missing in rows):
                self.republish()
            if not any(missing for _, missing in rows):
                return [done[p.index] for p in prompts]

    def faults(self) -> dict[str, int]:
        """Failures of all nodes' engines since the last call, as metrics; nothing where they may not fail.

        engine/quarantined: servers taken out of service; engine/restarts: servers that came up again;
        engine/redone_requests: requests they had not answered. Every rank calls it.
        """
        if self.republish is None:
            return {}
        mine = self.engine.take_counts() if isinstance(self.engine, EnginePool) else {}
        rows = self.ranks.all_gather(mine, "engine failures")
        return {f"engine/{name}": sum(row.get(name, 0) for row in rows) for name in COUNTS}

    def _ask(self, prompts: list[Prompt], purpose: str, round_index: int) -> dict[int, list[Rollout]]:
        """Responses by prompt index; those of some prompts are missing where the engine broke and is being restarted."""
        if self.engine is None or not prompts:
            return {}
        requests = self.requests(prompts, purpose, round_index)
        asked = list(requests.values())
        try:
            rows = self.engine.generate(asked, self.spec(purpose))
            answers = {request.request_id: row for request, row in zip(asked, rows, strict=True)}
        except EngineDown as down:
            if self.republish is None:
                raise
            answers = down.finished
        return {
            index: [self.rollout(raw) for raw in answers[request.request_id]]
            for index, request in requests.items()
            if request.request_id in answers
        }

    def needs_weights(self) -> bool:
        """Whether this node's engine waits for a publication."""
        return isinstance(self.engine, EnginePool) and self.engine.needs_weights()

    def requests(self, prompts: list[Prompt], purpose: str, round_index: int) -> dict[int, Request]:
        """What the engine is asked, by prompt index."""
        return {
            p.index: Request(
                prompt_token_ids=p.token_ids,
                seed=derive_seed(self.recipe.train.seed, purpose, round_index, p.index),
                request_id=f"{purpose}-{round_index}-{p.index}",
            )
            for p in prompts
        }

    def spec(self, purpose: str) -> SamplingSpec:
        """How it is asked."""
        r, t = self.recipe.rollout, self.recipe.train
        temperature, top_p = r.temperature, r.top_p
        if purpose == "heldout":
            temperature = temperature if t.heldout_temperature is None else t.heldout_temperature
            top_p = top_p if t.heldout_top_p is None else t.heldout_top_p
        return SamplingSpec(
            n={"train": r.n, "greedy": 1, "heldout": t.heldout_n}[purpose],
            max_tokens=r.max_response_tokens,
            temperature=0.0 if purpose == "greedy" else temperature,
            top_p=top_p,
            top_k=r.top_k,
            stop_token_ids=tuple(r.stop_token_ids),
        )

    def rollout(self, raw: RawRollout) -> Rollout:
        """The response with its text."""
        text = self.decode(list(raw.token_ids))
        return Rollout(raw.token_ids, raw.logprobs, raw.finish_reason, raw.spans, text)


class EngineWatch:
    """Notices within about 10 seconds that a server which this node started died while the trainer computes.

    Nobody is asked, so the end of one of engine.urls is noticed at the next generation or publication.
    """

    def __init__(self, engine: GenerationEngine | None, *, restarts: bool) -> None:
        """engine: None on ranks that lead no node. restarts: a dead engine is mended at the next publication."""
        self._engine = None if restarts else engine
        self._asked = time.monotonic()
        self._silent = 0

    def __call__(self) -> None:
        """Raises EngineError when two looks in a row, some seconds apart, found the engine gone."""
        if self._engine is None or time.monotonic() - self._asked < WATCH_S:
            return
        self._silent = 0 if self._engine.alive() else self._silent + 1
        self._asked = time.monotonic()
        if self._silent > 1:
            raise EngineError("this node's engine died while the trainer computed: logs/ of the run's folder says why")


def evaluate(
    heldout: list[Prompt] | None, sampler: Sampler, grader: Grader | None, ranks: Ranks, metric: str
) -> float | None:
    """Mean of `metric` (see `Scored.metric`) on the held-out prompts, with the same seeds at every evaluation.

    Every rank calls it; leads of nodes take a share each. None without held-out prompts.
    """
    sums = torch.zeros(2)
    mine = [p for p in heldout or [] if p.index % ranks.nodes == ranks.node]
    rollouts = sampler(mine, "heldout", 0)
    if grader and mine:
        groups = grader(list(zip(mine, rollouts, strict=True)))
        values = [m.metric(metric) for g in groups for m in g.members]
        known = [value for value in values if value is not None]
        sums += torch.tensor([sum(known), float(len(known))])
    total, count = ranks.sum(sums, "held-out scores").tolist()
    return total / count if count else None
