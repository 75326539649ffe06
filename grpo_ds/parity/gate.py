"""Before the first token is paid for, and every sync.parity_every rounds, engine and trainer must agree.

Each node's engine answers a few fixed prompts with fixed seeds; the trainer computes the log-probabilities of the same
tokens. Above the limits the run stops, and the trainer computes them again under each hypothesis about what the engine
may do otherwise (`grpo_ds.parity.causes`), so that the message names the cause.

A small gap alone does not show that publications arrive: in 16 bits it hides many small steps. So the run also stops
when the engines answer bit for bit as at the last gate, and the trainer finds other log-probabilities for that.

Cost at 64 nodes x 8 ranks, 70B, 32k tokens: a node's engine decodes 256 tokens of 32 responses (about 10 s), the ranks
exchange 0.5M sampled tokens and their prompts (~40 MB in all) and make one forward pass over about 3k tokens each (one
gather of the weights); in 50 rounds of minutes that is less than a thousandth. The diagnosis, once, is about 15 such
passes, and holds the head twice on each rank (2 x 2 GB). Kept in between: each rank's shard of the head at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_ds.actor.policy import Policy
from grpo_ds.balance import assign
from grpo_ds.batching import Layout, MicroBatch, collate
from grpo_ds.collect import Prompts
from grpo_ds.config import Recipe
from grpo_ds.dist import Ranks
from grpo_ds.evaluate import EngineSampler
from grpo_ds.metrics import reduce_stats
from grpo_ds.objective import Stats, merge
from grpo_ds.parity.causes import HYPOTHESES, unchanged
from grpo_ds.parity.gap import Finding, Gap, diagnosis, explains, gap_of, gap_stats, limits_of
from grpo_ds.shards import Shard
from grpo_ds.types import Prompt, Rollout, Sample

PROMPTS = 8
"""Prompts of a probe for each engine."""
RESPONSES = 4
"""Responses a prompt, at most: more than one, so that a shared prefix is looked at too."""
TOKENS = 256
"""Longest response of the probe."""


class ParityError(RuntimeError):
    """Engine and trainer disagree; the message holds the numbers and the cause. Raised on every rank."""


class Reference(Protocol):
    def logprobs(self, micro: MicroBatch) -> Tensor: ...


class Publisher(Protocol):
    shards: list[Shard]

    def republish(self) -> None: ...


Answers = list[tuple[Prompt, Rollout]]


@dataclass(frozen=True)
class Probe:
    """The answers of the engines, as this rank looks at them."""

    answers: Answers
    """What this node's engine said; empty on ranks that lead no node."""
    samples: list[list[Sample]]
    """[micro-batch] of this rank; some may be empty, all ranks have the same number."""
    batches: list[MicroBatch]
    trainer: list[Tensor]
    """(M,) log-probabilities of each micro-batch under the policy."""
    gap: Gap

    def says_as(self, other: Probe) -> bool:
        """Whether this node's engine gave the same tokens with the same log-probabilities, to the last bit."""
        rows = zip(self.answers, other.answers, strict=True)
        return all(now.token_ids == then.token_ids and now.logprobs == then.logprobs for (_, now), (_, then) in rows)

    def scores_as(self, other: Probe) -> bool:
        """Whether this rank found the same log-probabilities, to the last bit."""
        if len(self.trainer) != len(other.trainer):
            return False
        return all(torch.equal(now, then) for now, then in zip(self.trainer, other.trainer, strict=True))


class ParityGate:
    """Compares this run's engines with its policy. Every rank calls every method."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        dtype: str,
        ranks: Ranks,
        prompts: Prompts | None,
        sampler: EngineSampler,
        policy: Policy,
        reference: Reference | None,
        publisher: Publisher,
        settle: Callable[[], None],
        layout: Layout,
        bos: int | None,
    ) -> None:
        """prompts: None on ranks that lead no node. settle: waits until nothing else is in flight in the engines. bos:
        the tokenizer's token that may stand before a prompt.

        Made before a checkpoint is loaded: it keeps the output head of the model as the engines have read it.
        """
        self.recipe = _probe_recipe(recipe)
        self.dtype = dtype
        self.limits = limits_of(recipe.sync, dtype)
        self.ranks = ranks
        self.prompts = prompts
        self.sampler = replace(sampler, recipe=self.recipe)
        self.policy = policy
        self.reference = reference
        self.publisher = publisher
        self.settle = settle
        self.layout: Layout = layout
        self.bos = bos
        self.head = self.shard_of(policy.engine.module.head.weight)
        self.first_head = self.head.local(ranks.rank).clone()
        """This rank's part of the head that the engines started with."""
        self.probe: Probe | None = None
        """Of the last `measure`."""
        self.version = 0
        """Its policy version."""
        self.stuck = False
        """It is one that no publication can have reached."""
        self.agreed: Probe | None = None
        """The last probe that passed."""
        self.agreed_version = 0

    def measure(self, version: int) -> dict[str, float]:
        """Asks and compares; returns `parity/max`, `parity/p99` and `parity/mean` in nats. version: what is published."""
        self.settle()
        self.probe, self.version = self.ask(), version
        self.stuck = self._stuck(self.probe)
        gap = self.probe.gap
        return {"parity/max": gap.max, "parity/p99": gap.p99, "parity/mean": gap.mean}

    def require(self) -> None:
        """Raises ParityError with a diagnosis when the last probe did not pass; nothing before the first one."""
        if self.probe is None:
            return
        if not self.passed:
            raise ParityError(f"{self.report()}. {self.diagnose()}")
        self.agreed, self.agreed_version = self.probe, self.version

    @property
    def passed(self) -> bool:
        """Whether there was a probe, within the limits, of engines that are not stuck; the same on every rank."""
        return self.probe is not None and self.probe.gap.within(self.limits) and not self.stuck

    def _stuck(self, probe: Probe) -> bool:
        """Whether no engine says anything new since the last gate, and the trainer does; the same on every rank."""
        if self.agreed is None:
            return False
        new = torch.tensor([float(not probe.says_as(self.agreed)), float(not probe.scores_as(self.agreed))])
        engines, trainer = self.ranks.max(new, "parity").tolist()
        return not engines and bool(trainer)

    def report(self) -> str:
        """The last probe in one line."""
        assert self.probe is not None, "measure() comes before report()"
        gap, limits = self.probe.gap, self.limits
        return (
            f"parity at policy version {self.version}: |trainer - engine| log-probability of {gap.tokens} probe tokens: "
            f"max {gap.max:.2g}, p99 {gap.p99:.2g}, mean {gap.mean:.2g} nats (allowed: sync.parity_max {limits.max:g}, "
            f"sync.parity_p99 {limits.p99:g}, sync.parity_mean {limits.mean:g})"
        )

    def diagnose(self) -> str:
        """Tries the hypotheses one after the other until one explains the gap; the sentence that says so."""
        probe = self.probe
        assert probe is not None, "measure() comes before diagnose()"
        findings: list[Finding] = []
        if self.stuck:
            return diagnosis(probe.gap, unchanged(self, probe), self.limits)
        for attempt in HYPOTHESES if probe.gap.tokens and not probe.gap.bad else ():
            findings += attempt(self, probe)
            # All ranks hold the same findings, so they leave together.
            if any(explains(probe.gap, finding, self.limits) for finding in findings):
                break
        return diagnosis(probe.gap, findings, self.limits)

    def ask(self) -> Probe:
        """The engines' answers to the fixed prompts, scored by the policy."""
        count = PROMPTS * self.recipe.engine.replicas
        prompts = self.prompts.take(self.ranks.node * count, count) if self.prompts else []
        rows = self.sampler(prompts, "train", 0)
        answers = [(prompt, rollout) for prompt, row in zip(prompts, rows, strict=True) for rollout in row]
        made = [_sample(prompt, rollout) for prompt, rollout in answers]
        work = assign(self.recipe, self.ranks, self.layout, range(count * self.ranks.nodes), made)
        samples = [
            [work.samples[i] for i in micro] for step in work.plan for micro in step.micro_batches[self.ranks.rank]
        ]
        batches = self.batches(samples)
        trainer = [self.policy.logprobs(batch) for batch in batches]
        return Probe(answers, samples, batches, trainer, self.gap(batches, trainer))

    def batches(self, samples: Sequence[Sequence[Sample]]) -> list[MicroBatch]:
        """The micro-batches as tensors."""
        return [collate(micro, self.layout).to(self.policy.device) for micro in samples]

    def gap(self, batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> Gap:
        """From `values`, (M,) for each micro-batch, to what the engines said; over all ranks."""
        rows = zip(values, batches, strict=True)
        return gap_of(self.merged([gap_stats(value, batch.rollout_logprobs) for value, batch in rows]))

    def merged(self, stats: Sequence[Stats]) -> Stats:
        """Statistics of this rank's micro-batches, merged with those of all ranks."""
        return reduce_stats(reduce(merge, stats), self.ranks)

    def shard_of(self, parameter: Any) -> Shard:
        """This rank's part of a parameter of the policy."""
        return next(shard for shard in self.publisher.shards if shard.param is parameter)

    def whole(self, shard: Shard, mine: Tensor) -> Tensor:
        """The tensor of which every rank gives its part; on every rank."""
        data = mine.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        parts = self.ranks.exchange([data] * self.ranks.world, "output head")
        flat = torch.frombuffer(bytearray(b"".join(parts)), dtype=mine.dtype)
        return flat[: shard.numel].view(shard.shape).to(self.policy.device)


def _probe_recipe(recipe: Recipe) -> Recipe:
    """The run's recipe with a few short responses a prompt, sampled from all tokens.

    top_p and top_k are off also where the run has them on: the trainer's log-probabilities are those of all tokens.
    """
    r, a = recipe.rollout, recipe.algorithm
    longest = min(r.max_response_tokens, TOKENS)
    return replace(
        recipe,
        rollout=replace(r, n=min(r.n, RESPONSES), max_response_tokens=longest, top_p=1.0, top_k=0),
        algorithm=replace(a, filter_groups=replace(a.filter_groups, enable=False)),
        reward=replace(recipe.reward, overlong_buffer_len=0),
    )


def _sample(prompt: Prompt, rollout: Rollout) -> Sample:
    """The answer as a sequence to score; advantages and versions are not used."""
    start, length = len(prompt.token_ids), len(prompt.token_ids) + len(rollout.token_ids)
    zeros = torch.zeros(length)
    sample = Sample(
        prompt_index=prompt.index,
        token_ids=torch.tensor([*prompt.token_ids, *rollout.token_ids]),
        response_mask=torch.arange(length) >= start,
        rollout_logprobs=zeros.clone(),
        advantages=zeros,
        versions=zeros.long(),
    )
    sample.rollout_logprobs[start:] = torch.tensor(rollout.logprobs)
    return sample
