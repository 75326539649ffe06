"""One round's groups: generate, score, filter, until the round has what it needs (DAPO's dynamic sampling).

Every node's leading rank drives its own engine on its share of each generation batch; only a line of scalars a group
(prompt index, verdict, version) crosses nodes, so every rank takes the same decision and the loop never ends at
different times. Groups are taken in prompt order, whatever node made them. What a round does not need is carried to
the next one with the policy version that made it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from grpo_ds.clock import Clock
from grpo_ds.config import Recipe
from grpo_ds.dist import Ranks
from grpo_ds.filters import Decision
from grpo_ds.types import Group, Prompt, Rollout


class Exhausted(RuntimeError):
    """The generation budget of a round is used up and gave too few groups."""


class Prompts(Protocol):
    def take(self, start: int, count: int) -> list[Prompt]: ...


class Sampler(Protocol):
    """Generates the rollouts of prompts with seeds that depend on (run seed, purpose, round, prompt) only.

    Every rank calls it at the same time, those without an engine with no prompts.
    """

    def __call__(self, prompts: list[Prompt], purpose: str, round_index: int) -> list[list[Rollout]]: ...


class Grader(Protocol):
    def __call__(self, pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]: ...


class GroupFilter(Protocol):
    def __call__(self, scores: list[float | None]) -> Decision: ...


@dataclass(frozen=True)
class Verdict:
    """What every rank knows about a group that some node made."""

    index: int
    """Prompt index: the draw order."""
    keep: bool
    reason: str
    version: int
    node: int


@dataclass(frozen=True)
class Collection:
    """The groups of one round."""

    groups: list[Group]
    """This node's part, in prompt order; empty on ranks that do not lead a node."""
    order: list[int]
    """Prompt indices of all groups of the round on all nodes, ascending."""
    counts: dict[str, int]
    """Groups by verdict (kept, all_right, ...), `stale`, `surplus`; `batches` generated."""
    rollouts: list[Group] = field(default_factory=list)
    """Everything this node generated in the round, kept or not, for the record."""


class Collector:
    """Collects groups round after round; `cursor` and `carried` are its whole state.

    prompts, grader: given on ranks that lead a node, None elsewhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        prompts: Prompts | None,
        keep: GroupFilter,
        sampler: Sampler,
        grader: Grader | None,
        *,
        greedy_baseline: bool = False,
    ) -> None:
        self.recipe = recipe
        self.filter = recipe.algorithm.filter_groups
        self.ranks = ranks
        self.prompts = prompts
        self.keep = keep
        self.sampler = sampler
        self.grader = grader
        self.greedy_baseline = greedy_baseline
        self.cursor = 0
        self.carried: list[Group] = []
        """This node's kept groups that no round has used yet."""

    def collect(self, round_index: int, version: int, clock: Clock) -> Collection:
        """Generates until `train.prompts_per_round` groups are kept, or the budget is used up.

        version: the policy version of the engines now. Raises Exhausted naming the counts (filter_groups.on_exhausted).
        """
        counts: Counter[str] = Counter()
        needed = self.recipe.train.prompts_per_round
        self._drop_stale(version, counts)
        available = self._agree([self._verdict(g, Decision(True, "kept")) for g in self.carried])
        made: list[Group] = []
        while len(available) < needed:
            limit = self.filter.max_num_gen_batches
            if limit and counts["batches"] >= limit:
                self._exhausted(round_index, counts, len(available), needed)
                break
            fresh = self._generate(round_index, clock)
            made += fresh
            decisions = [self._decide(group) for group in fresh]
            self.carried += [g for g, d in zip(fresh, decisions, strict=True) if d.keep]
            verdicts = self._agree([self._verdict(g, d) for g, d in zip(fresh, decisions, strict=True)])
            counts.update(v.reason for v in verdicts)
            counts["batches"] += 1
            available += [v for v in verdicts if v.keep]
        chosen = sorted(v.index for v in available)[:needed]
        taken = set(chosen)
        counts["surplus"] = len(available) - len(chosen)
        groups = sorted((g for g in self.carried if g.prompt.index in taken), key=lambda g: g.prompt.index)
        self.carried = [g for g in self.carried if g.prompt.index not in taken]
        return Collection(groups, chosen, dict(counts), made)

    def _drop_stale(self, version: int, counts: Counter[str]) -> None:
        fresh = [g for g in self.carried if version - g.version <= self.filter.max_staleness]
        dropped = self.ranks.all_gather(len(self.carried) - len(fresh), "stale groups")
        counts["stale"] = sum(dropped)
        self.carried = fresh

    def _generate(self, round_index: int, clock: Clock) -> list[Group]:
        """This node's share of the next generation batch, scored; the cursor moves on every rank."""
        start, count = self.cursor, self.recipe.prompts_per_batch
        self.cursor += count
        draw = self.prompts.take(start, count) if self.prompts else []
        mine = [prompt for prompt in draw if prompt.index % self.ranks.nodes == self.ranks.node]
        with clock.time("generation"):
            rollouts = self.sampler(mine, "train", round_index)
            greedy = self.sampler(mine, "greedy", round_index) if self.greedy_baseline else None
        if self.grader is None:
            return []
        with clock.time("reward"):
            groups = self.grader(list(zip(mine, rollouts, strict=True)))
            if greedy is None:
                return groups
            baselines = self.grader(list(zip(mine, greedy, strict=True)))
            return [replace(g, baseline=b.members[0]) for g, b in zip(groups, baselines, strict=True)]

    def _decide(self, group: Group) -> Decision:
        metric = self.filter.metric_to_filter
        scores = [m.score if metric == "score" else m.parts[metric] for m in group.members]
        if not self.filter.enable:
            scored = any(score is not None for score in scores)
            return Decision(scored, "kept" if scored else "unscorable")
        return self.keep(scores)

    def _verdict(self, group: Group, decision: Decision) -> Verdict:
        return Verdict(group.prompt.index, decision.keep, decision.reason, group.version, self.ranks.node)

    def _agree(self, mine: list[Verdict]) -> list[Verdict]:
        """All nodes' verdicts, on every rank."""
        rows: list[Any] = [[v.index, v.keep, v.reason, v.version, v.node] for v in mine]
        return [Verdict(*row) for part in self.ranks.all_gather(rows, "filter verdicts") for row in part]

    def _exhausted(self, round_index: int, counts: Counter[str], have: int, needed: int) -> None:
        if have and self.filter.on_exhausted == "train_partial":
            return
        seen = ", ".join(f"{counts[r]} {r}" for r in ("kept", "all_right", "all_wrong", "unscorable") if counts[r])
        raise Exhausted(
            f"round {round_index}: {counts['batches']} generation batches (algorithm.filter_groups.max_num_gen_batches)"
            f" gave {have} of {needed} groups whose scores differ ({seen or 'no group at all'}): use easier or harder"
            " prompts, raise rollout.n or the limit, or set on_exhausted: train_partial"
        )
