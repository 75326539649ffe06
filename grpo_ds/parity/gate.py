"""Before the first token is paid for, and every sync.parity_every rounds, engine and trainer must agree.

Each node's engine answers a few fixed prompts with fixed seeds; the trainer computes the log-probabilities of the same
tokens. Above the limits the run stops, and the trainer computes them again under each hypothesis about what the engine
may do otherwise (`grpo_ds.parity.causes`), so that the message names the cause.

The gap is that of the node where it is largest, and the cause is looked for there: one engine in a hundred that is wrong
would be a hundredth of all tokens.

A small gap alone does not show that publications arrive: in 16 bits it hides many small steps. So the run also stops
when an engine answers with the weights of the last gate, which the trainer has left (`grpo_ds.parity.stale`).

Cost at 64 nodes x 8 ranks, 70B, 32k tokens: a node's engine decodes 256 tokens of 32 responses (about 10 s), the ranks
exchange 0.5M sampled tokens and their prompts (~40 MB in all) and make one forward pass over about 3k tokens each (one
gather of the weights); in 50 rounds of minutes that is less than a thousandth. The diagnosis, once, is about 15 such
passes, and holds the head twice on each rank (2 x 2 GB). Kept in between: each rank's shard of the head at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_ds.actor.policy import Policy
from grpo_ds.balance import assign, per_token_home
from grpo_ds.batching import Layout, MicroBatch, collate
from grpo_ds.collect import Prompts
from grpo_ds.config import Recipe
from grpo_ds.dist import Ranks
from grpo_ds.evaluate import EngineSampler
from grpo_ds.metrics import reduce_stats
from grpo_ds.objective import Stats, merge
from grpo_ds.parity.causes import HYPOTHESES
from grpo_ds.parity.gap import Finding, Gap, diagnosis, explains, farthest, gap_of, gap_stats, limits_of, worst
from grpo_ds.parity.stale import Scored, stands_still
from grpo_ds.shards import Shard
from grpo_ds.sync.transport import urls_of_node
from grpo_ds.types import Prompt, Rollout, Sample

PROMPTS = 8
"""Prompts of a probe for each server; the pool's shares see to it that each is asked some."""
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
    scored: list[Scored]
    """`answers` with their log-probabilities under the policy."""
    nodes: list[Gap]
    """Of each node's engine."""

    @property
    def gap(self) -> Gap:
        """The worst of all nodes."""
        return worst(self.nodes)


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
        self.count = PROMPTS * _servers(recipe, ranks.nodes)
        """Prompts of a node."""
        self.head = self.shard_of(policy.engine.module.head.weight)
        self.first_head = self.head.local(ranks.rank).clone()
        """This rank's part of the head that the engines started with."""
        self.probe: Probe | None = None
        """Of the last `measure`."""
        self.version = 0
        """Its policy version."""
        self.stale = ""
        """Which engine no publication can have reached, in a sentence; empty: none."""
        self.agreed: Probe | None = None
        """The last probe that passed."""
        self.agreed_version = 0

    def measure(self, version: int) -> dict[str, float]:
        """Asks and compares; returns `parity/max`, `parity/p99` and `parity/mean` in nats. version: what is published."""
        self.settle()
        self.probe, self.version = self.ask(), version
        self.stale = self._stale(self.probe)
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
        """Whether there was a probe, within the limits, of engines that are not stale; the same on every rank."""
        return self.probe is not None and self.probe.gap.within(self.limits) and not self.stale

    def _stale(self, probe: Probe) -> str:
        """Says which node's engine answers with the weights of the last gate, if one does; the same on every rank."""
        if self.agreed is None:
            return ""
        how = stands_still(probe.scored, self.agreed.scored) if probe.scored else ""
        found = [(node, how) for node, how in self.ranks.all_gather([self.ranks.node, how], "parity") if how]
        if not found:
            return ""
        node, how = found[0]
        whose = "the engine" if how == "exactly" else "the engine, or one of its servers,"
        return (
            f"stale weights: {whose} answers {how} as it did at policy version {self.agreed_version} (node {node}), so the "
            "publications since then have not reached it"
        )

    def report(self) -> str:
        """The last probe in one line."""
        assert self.probe is not None, "measure() comes before report()"
        gap, limits = self.probe.gap, self.limits
        where = f" on the worst of {self.ranks.nodes} nodes" if self.ranks.nodes > 1 else ""
        return (
            f"parity at policy version {self.version}: |trainer - engine| log-probability of {gap.tokens} probe tokens: "
            f"max {gap.max:.2g}, p99 {gap.p99:.2g}, mean {gap.mean:.2g} nats{where} (allowed: "
            f"sync.parity_max {limits.max:g}, sync.parity_p99 {limits.p99:g}, sync.parity_mean {limits.mean:g})"
        )

    def diagnose(self) -> str:
        """Tries the hypotheses one after the other until one explains the gap; the sentence that says so."""
        assert self.probe is not None, "measure() comes before diagnose()"
        if self.stale and self.probe.gap.within(self.limits):
            return f"Cause: {self.stale}"
        if self.probe.gap.bad or not self.probe.gap.tokens:
            return diagnosis(self.probe.gap, [], self.limits)
        probe = self._of_node(self.probe, farthest(self.probe.nodes, self.limits))
        findings: list[Finding] = []
        for attempt in HYPOTHESES:
            findings += attempt(self, probe)
            # All ranks hold the same findings, so they leave together.
            if any(explains(probe.gap, finding, self.limits) for finding in findings):
                break
        else:
            if self.stale:
                return f"Cause: {self.stale}"
        return diagnosis(probe.gap, findings, self.limits)

    def ask(self) -> Probe:
        """The engines' answers to the fixed prompts, scored by the policy."""
        prompts = self.prompts.take(self.ranks.node * self.count, self.count) if self.prompts else []
        rows = self.sampler(prompts, "train", 0)
        answers = [(prompt, rollout) for prompt, row in zip(prompts, rows, strict=True) for rollout in row]
        made = [_sample(prompt, rollout) for prompt, rollout in answers]
        work = assign(self.recipe, self.ranks, self.layout, range(self.count * self.ranks.nodes), made)
        parts = [
            [[work.samples[i] for i in micro] for micro in step.micro_batches[self.ranks.rank]] for step in work.plan
        ]
        samples = [micro for part in parts for micro in part]
        batches = self.batches(samples)
        trainer = [self.policy.logprobs(batch) for batch in batches]
        values = iter(trainer)
        home = per_token_home(work, self.ranks, [[next(values) for _ in part] for part in parts])
        scored = [(*answer, logprobs) for answer, logprobs in zip(answers, home, strict=True)]
        return Probe(answers, samples, batches, trainer, scored, self._gaps(scored))

    def _gaps(self, scored: Sequence[Scored]) -> list[Gap]:
        """Of every node, on every rank; scored: what this node's engine said, on the rank that leads it."""
        ours = torch.cat([torch.empty(0), *(logprobs for *_, logprobs in scored)])
        engine = torch.tensor([value for _, rollout, _ in scored for value in rollout.logprobs])
        mine = astuple(gap_of(gap_stats(ours, engine))) if self.ranks.leads_node else None
        return [Gap(*row) for row in self.ranks.all_gather(mine, "parity") if row is not None]

    def _of_node(self, probe: Probe, node: int) -> Probe:
        """What one node's engine said."""
        if self.ranks.nodes == 1:
            return probe
        samples = [[sample for sample in micro if sample.prompt_index // self.count == node] for micro in probe.samples]
        batches, here = self.batches(samples), self.ranks.node == node
        trainer = [self.policy.logprobs(batch) for batch in batches]
        answers, scored = (probe.answers, probe.scored) if here else ([], [])
        return Probe(answers, samples, batches, trainer, scored, [probe.nodes[node]])

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


def _servers(recipe: Recipe, nodes: int) -> int:
    """Servers of a node; the most where engine.urls gives some nodes one more, because all ask as many prompts."""
    urls = recipe.engine.urls
    return max(len(urls_of_node(urls, node, nodes)) for node in range(nodes)) if urls else recipe.engine.replicas


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
