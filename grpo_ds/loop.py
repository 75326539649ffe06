"""The training loop: prompts -> rollouts -> rewards -> filter -> advantages -> micro-batches -> loss -> step -> sync.

Every rank runs this file. Ranks that lead a node also drive its engine; what crosses ranks is a line of scalars a
group, each sample once, and the denominators. A *round* is one collection and one weight publication (one policy
version); it holds one or more *optimizer steps*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_ds.balance import Assignment, assign, per_token_home
from grpo_ds.batching import Layout, MicroBatch, UpdatePlan
from grpo_ds.clock import Clock
from grpo_ds.collect import Collection, Collector
from grpo_ds.colocation import Colocation
from grpo_ds.config import Recipe
from grpo_ds.dist import Ranks
from grpo_ds.losses import KlController, kl_estimate
from grpo_ds.metrics import reduce_stats, round_metrics
from grpo_ds.objective import Objective, Stats, merge
from grpo_ds.samples import AdvantageStage
from grpo_ds.seeds import derive_seed
from grpo_ds.types import Group, Sample


class Actor(Protocol):
    """The policy under training."""

    device: torch.device

    @property
    def lr(self) -> float: ...
    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]: ...
    def logprobs(self, micro: MicroBatch) -> Tensor: ...
    def backward(self, loss_share: Tensor) -> None: ...
    def step(self) -> float: ...


class Reference(Protocol):
    """The frozen reference."""

    def logprobs(self, micro: MicroBatch) -> Tensor: ...


class Publisher(Protocol):
    """Gives the engines the actor's weights as a new policy version."""

    def publish(self, version: int) -> dict[str, float]: ...


class Parity(Protocol):
    """The gate that compares engine and trainer on a fixed probe."""

    def measure(self, version: int) -> dict[str, float]: ...
    def require(self) -> None: ...


class RoundLog(Protocol):
    """Where a round's numbers and rollouts go."""

    def round(self, metrics: dict[str, Any], rollouts: Sequence[Group]) -> None: ...


@dataclass
class Parts:
    """What the loop works with."""

    ranks: Ranks
    collector: Collector
    advantage: AdvantageStage
    objective: Objective
    actor: Actor
    reference: Reference | None
    kl: KlController
    publisher: Publisher
    parity: Parity
    log: RoundLog
    layout: Layout
    evaluate: Callable[[int], dict[str, float]]
    """Called on every rank with the rounds finished: the held-out evaluation as metrics, empty where none is due."""
    after_round: Callable[[int, int, dict[str, Any]], None]
    """Called on every rank with (rounds finished, version, metrics): checkpoints."""
    colocation: Colocation
    check_engine: Callable[[], None]
    """Called on every rank while it computes: raises where this node's engine is gone."""
    counts: Callable[[], dict[str, float]]
    """Called on every rank: the metrics reward/* and engine/*, what happened to both since the last call."""
    reward_functions: tuple[str, ...]
    """The names under which groups hold each function's rewards."""


def train(recipe: Recipe, parts: Parts, first_round: int, version: int) -> int:
    """Runs rounds `first_round` to `train.rounds`; the engines hold policy `version`. Returns the last version."""
    for round_index in range(first_round, recipe.train.rounds):
        clock = Clock()
        parts.ranks.where = f"round {round_index}"
        torch.manual_seed(derive_seed(recipe.train.seed, "round", round_index, parts.ranks.rank))

        collection = parts.collector.collect(round_index, version, clock)
        parts.colocation.after("generate")
        samples, known = advantages(recipe, parts, collection, clock)
        work = assign(recipe, parts.ranks, parts.layout, collection.order, samples)
        stats, norms = update(parts, work, version, clock, known)
        parts.colocation.after("update")
        version += 1
        with clock.time("sync"):
            phases = parts.publisher.publish(version)
        parts.colocation.after("sync")

        metrics: dict[str, Any] = {"round": round_index, "version": version}
        metrics |= {"kl_coef": parts.kl.coef, "lr": parts.actor.lr}
        metrics |= inspect(recipe, parts, round_index + 1, version, clock)
        left_out = parts.advantage.left_out(collection.groups)
        metrics |= round_metrics(collection, work.plan, stats, norms, parts.ranks, parts.reward_functions, left_out)
        metrics |= parts.counts() | parts.colocation.metrics() | clock.metrics(sync=phases)
        if "kl" in metrics:  # nothing was measured without a reference, or in a round without a token to train on
            parts.kl.update(metrics["kl"], metrics["samples"])
        parts.log.round(metrics, collection.rollouts)
        check_freshness(recipe, round_index, version - 1, metrics["logprob_gap"])
        parts.parity.require()
        parts.after_round(round_index + 1, version, metrics)
    return version


def inspect(recipe: Recipe, parts: Parts, done: int, version: int, clock: Clock) -> dict[str, float]:
    """The parity gate and the held-out evaluation, where they are due after `done` rounds, as metrics."""
    found: dict[str, float] = {}
    if recipe.sync.parity_every and done % recipe.sync.parity_every == 0:
        with clock.time("parity"):
            found |= parts.parity.measure(version)
    with clock.time("evaluation"):
        found |= parts.evaluate(done)
    return found


@dataclass(frozen=True)
class Frozen:
    """What the round's start says about this rank's micro-batches of a plan: [optimizer step][micro-batch] (M,)."""

    plan: list[UpdatePlan]
    old: list[list[Tensor]] | None
    """Log-probabilities of the policy."""
    ref: list[list[Tensor]] | None
    """Those of the reference; None without one."""


def freeze(parts: Parts, work: Assignment, steps: list[list[MicroBatch]], *, old: bool) -> Frozen:
    """One pass of the reference where there is one, and one of the policy where `old` asks for it."""
    actor, reference = parts.actor, parts.reference
    return Frozen(
        work.plan,
        [[actor.logprobs(m) for m in micros] for micros in steps] if old else None,
        [[reference.logprobs(m) for m in micros] for micros in steps] if reference else None,
    )


def advantages(
    recipe: Recipe, parts: Parts, collection: Collection, clock: Clock
) -> tuple[list[Sample], Frozen | None]:
    """The samples this node made, with advantages; KL placed in the reward is taken off before the estimator.

    The second value is what was computed for that.
    """
    if parts.reference is None or recipe.actor.kl_placement == "loss":
        return parts.advantage(collection.groups, oldest=collection.oldest), None
    drafts = parts.advantage.drafts(collection.groups)
    work = assign(recipe, parts.ranks, parts.layout, collection.order, drafts)
    with clock.time("logprobs"):
        known = freeze(parts, work, work.micro_batches(parts.ranks.rank, parts.layout, parts.actor.device), old=True)
        pairs = [zip(*rows, strict=True) for rows in zip(known.old or (), known.ref or (), strict=True)]
        kl = [[parts.kl.coef * kl_estimate(recipe.actor.kl_loss_type, *pair) for pair in row] for row in pairs]
        penalties = per_token_home(work, parts.ranks, kl)
    return parts.advantage(collection.groups, penalties, collection.oldest), known


def update(
    parts: Parts, work: Assignment, version: int, clock: Clock, known: Frozen | None = None
) -> tuple[Stats, list[float]]:
    """The optimizer steps of the round that have a token to train on.

    Returns statistics over these steps and all ranks, empty where there was none, and their gradient norms.
    """
    cut = work.micro_batches(parts.ranks.rank, parts.layout, parts.actor.device)
    # Without a token there is no step: momentum and weight decay alone would move the weights, and the warm-up would go
    # on. Every rank has the same plan.
    steps = [micros if plan.totals.tokens else [] for plan, micros in zip(work.plan, cut, strict=True)]
    # One step a round: the old policy is the one being differentiated, so no pass is made for it.
    several = sum(bool(micros) for micros in steps) > 1
    # Masks that come after the estimator change the plan; every rank has the same two plans.
    if known is None or known.plan != work.plan:
        with clock.time("logprobs"):
            known = freeze(parts, work, steps, old=several)
    old, ref = known.old if several else None, known.ref

    stats: list[Stats] = []
    norms: list[float] = []
    for k, (plan, micros) in enumerate(zip(work.plan, steps, strict=True)):
        if not micros:
            continue
        with clock.time("update"):
            stats += accumulate(parts, plan, micros, version, old[k] if old else None, ref[k] if ref else None)
            norms.append(parts.actor.step())
        if not norms[-1] < float("inf"):
            raise FloatingPointError(
                f"{parts.ranks.where}, optimizer step {k}: the gradient norm is {norms[-1]}; the last checkpoint is "
                "untouched: lower actor.lr, and look at rollouts/ of this round"
            )
    return reduce_stats(reduce(merge, stats, {}), parts.ranks), norms


def accumulate(
    parts: Parts,
    plan: UpdatePlan,
    micros: list[MicroBatch],
    version: int,
    old: list[Tensor] | None,
    ref: list[Tensor] | None,
) -> list[Stats]:
    """Adds up the gradient of an optimizer step; returns the statistics of this rank's micro-batches.

    old, ref: (M,) for each micro-batch, as in `Frozen`.
    """
    stats = []
    for j, micro in enumerate(micros):
        parts.check_engine()
        logprobs, entropy = parts.actor.forward(micro)
        share, numbers = parts.objective(
            logprobs,
            entropy,
            micro,
            plan.totals,
            version=version,
            old_logprobs=old[j] if old else None,
            ref_logprobs=ref[j] if ref else None,
            kl_coef=parts.kl.coef,
        )
        parts.actor.backward(share)
        stats.append(numbers)
    return stats


def check_freshness(recipe: Recipe, round_index: int, version: int, gap: float) -> None:
    """Stops the run when engine and trainer disagree about tokens that the current policy just sampled."""
    if gap > recipe.sync.max_logprob_gap:
        raise RuntimeError(
            f"round {round_index}: log-probabilities of tokens sampled by policy {version} differ by {gap:.3g} nats on "
            f"average between engine and trainer (sync.max_logprob_gap {recipe.sync.max_logprob_gap}): the engine does "
            "not hold the published weights, or samples at another temperature, dtype or prompt template"
        )
