"""One round's groups: generate, score, filter, until the round has what it needs (DAPO's dynamic sampling).

Every node's leading rank drives its own engine on its share of each generation batch; only a line of scalars a group
(prompt index, verdict, version) crosses nodes, so every rank takes the same decision and the loop never ends at
different times. Groups are taken in prompt order, whatever node made them. What a round does not need is carried to
the next one with the policy versions that made it. A group counts as long as one of its tokens is young enough to be
trained on (filter_groups.max_staleness); its older tokens then give no loss (`grpo_ds.samples`).

With sync.mode keep or abort a round is over as soon as it has its groups. What still runs goes on beside the trainer
and becomes groups of a later round (keep), or is ended and its prompts are asked again (abort). While a round waits,
each look at what is answered costs one all-gather of those lines: at 64 nodes x 8 ranks about 0.1 s of a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from grpo_ds.clock import Clock
from grpo_ds.config import Recipe
from grpo_ds.dist import Ranks
from grpo_ds.filters import REGISTRY, Decision
from grpo_ds.types import Group, Prompt, Rollout

QUIET_BATCHES = 4
"""Generation batches of a round without a line on the screen; each further one has a line."""
DROPPED = "dropped/"
"""Begins the names under which dropped groups are counted; the filter's reason, whatever it is, ends them."""


class Exhausted(RuntimeError):
    """The generation budget of a round is used up and gave too few groups."""


class Prompts(Protocol):
    def take(self, start: int, count: int) -> list[Prompt]: ...


@dataclass(frozen=True)
class Answer:
    """What the engine made of a prompt."""

    prompt: Prompt
    train: list[Rollout] | None = None
    """rollout.n responses; None: aborted before all of them were whole."""
    greedy: list[Rollout] | None = None
    """One response, where the estimator needs a greedy baseline."""
    aborted_tokens: int = 0
    """Of an aborted prompt: the tokens of all its responses, which nobody uses."""


class Generation(Protocol):
    """This node's engine as the collector sees it; ranks without one ask for nothing. `grpo_ds.inflight` has two."""

    def ask(self, prompts: list[Prompt], round_index: int) -> None:
        """Begins to answer these prompts."""

    def answers(self, enough: int) -> list[Answer]:
        """Waits for `enough` answers, or some time, and takes what has come. Every rank calls it."""

    def abort(self) -> None:
        """Ends what is in flight on this node; it is among the next answers."""

    def settle(self) -> None:
        """Waits until nothing is in flight on any node. Every rank calls it."""


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
    reason: str | None
    """The filter's; None: there is no group, because the prompt's requests were aborted."""
    version: int
    """The oldest policy version that made any of its tokens that may be trained on."""
    node: int
    aborted_tokens: int = 0
    """See `Answer`."""


@dataclass(frozen=True)
class Collection:
    """The groups of one round."""

    groups: list[Group]
    """This node's part, in prompt order; empty on ranks that do not lead a node."""
    order: list[int]
    """Prompt indices of all groups of the round on all nodes, ascending."""
    counts: dict[str, int]
    """Groups: `kept`, `dropped/<reason>`, `surplus`; prompts: `aborted`, `asked_again`, `in_flight`; `batches` drawn;
    `tokens_aborted`."""
    rollouts: list[Group] = field(default_factory=list)
    """Everything this node generated in the round, kept or not, for the record."""
    lags: list[int] = field(default_factory=list)
    """Of each group in `order`: how many policy versions its oldest trained token is behind the engines."""
    oldest: int = 0
    """Tokens of policy versions before this one give no loss."""


class Collector:
    """Collects groups round after round; `cursor`, `carried`, `again` and `in_flight` are its whole state.

    prompts, grader: given on ranks that lead a node, None elsewhere. say: shows a line to the user.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        prompts: Prompts | None,
        keep: GroupFilter,
        generation: Generation,
        grader: Grader | None,
        say: Callable[[str], None],
    ) -> None:
        self.recipe = recipe
        self.filter = recipe.algorithm.filter_groups
        self.ranks = ranks
        self.prompts = prompts
        self.keep = keep
        self.generation = generation
        self.grader = grader
        self.say = say
        self.cursor = 0
        self.carried: list[Group] = []
        """This node's kept groups that no round has used yet."""
        self.again: list[int] = []
        """Prompts of all nodes that were drawn and must be asked once more, before new ones."""
        self.in_flight: set[int] = set()
        """Prompts of all nodes that were asked and have no verdict yet."""

    def collect(self, round_index: int, version: int, clock: Clock) -> Collection:
        """Generates until `train.prompts_per_round` groups are kept, or the budget is used up.

        version: the policy version of the engines now. Raises Exhausted naming the counts (filter_groups.on_exhausted).
        """
        counts: Counter[str] = Counter()
        needed = self.recipe.train.prompts_per_round
        self._drop_stale(version, counts)
        available = self._agree([self._verdict(g, Decision(True, "kept"), version) for g in self.carried])
        made: list[Group] = []
        while len(available) < needed:
            while len(available) + len(self.in_flight) < needed and self._ask(round_index, counts):
                if counts["batches"] > QUIET_BATCHES:
                    found = self._found(counts, len(available), needed)
                    self.say(f"round {round_index}: generation batch {counts['batches']} begins; so far {found}")
            if not self.in_flight:
                self._exhausted(round_index, counts, len(available), needed)
                break
            available += self._take(needed - len(available), version, clock, counts, made)
        if self.in_flight and self.recipe.sync.mode == "abort":
            self.generation.abort()
            available += self._take(0, version, clock, counts, made)
        chosen = sorted(available, key=lambda v: v.index)[:needed]
        taken = {v.index for v in chosen}
        counts["surplus"] = len(available) - len(chosen)
        if self.in_flight:
            counts["in_flight"] = len(self.in_flight)
        groups = sorted((g for g in self.carried if g.prompt.index in taken), key=lambda g: g.prompt.index)
        self.carried = [g for g in self.carried if g.prompt.index not in taken]
        order, lags = [v.index for v in chosen], [version - v.version for v in chosen]
        return Collection(groups, order, dict(counts), made, lags, self._oldest(version))

    def unfinished(self) -> list[int]:
        """Prompts that were drawn and have become neither groups nor drops: a resumed run asks them first."""
        return sorted({*self.again, *self.in_flight})

    def _oldest(self, version: int) -> int:
        """The oldest policy version whose tokens are trained on while the engines hold `version`."""
        return version - self.filter.max_staleness

    def _stale(self, group: Group, version: int) -> bool:
        """Whether all of its tokens are too old."""
        return max(group.versions, default=version) < self._oldest(version)

    def _drop_stale(self, version: int, counts: Counter[str]) -> None:
        fresh = [g for g in self.carried if not self._stale(g, version)]
        dropped = self.ranks.all_gather(len(self.carried) - len(fresh), "stale groups")
        counts[f"{DROPPED}stale"] = sum(dropped)
        self.carried = fresh

    def _ask(self, round_index: int, counts: Counter[str]) -> bool:
        """Asks each node its share of the next prompts, the cursor moving on every rank; False: none may be drawn."""
        limit = self.filter.max_num_gen_batches
        if self.again:
            draw, self.again = self.again, []
            counts["asked_again"] += len(draw)
        elif limit and counts["batches"] >= limit:
            return False
        else:
            draw = list(range(self.cursor, self.cursor + self.recipe.prompts_per_batch))
            self.cursor += len(draw)
            counts["batches"] += 1
        self.in_flight |= set(draw)
        if self.prompts is not None:
            mine = [index for index in draw if index % self.ranks.nodes == self.ranks.node]
            self.generation.ask([prompt for index in mine for prompt in self.prompts.take(index, 1)], round_index)
        return True

    def _take(self, enough: int, version: int, clock: Clock, counts: Counter[str], made: list[Group]) -> list[Verdict]:
        """What has been answered since the last look, judged by all; returns the kept groups' verdicts."""
        with clock.time("generation"):
            answers = self.generation.answers(enough)
        fresh = self._score(answers, clock)
        made += fresh
        decisions = [self._decide(group, version) for group in fresh]
        self.carried += [g for g, d in zip(fresh, decisions, strict=True) if d.keep]
        mine = [self._verdict(g, d, version) for g, d in zip(fresh, decisions, strict=True)]
        mine += [
            Verdict(a.prompt.index, False, None, version, self.ranks.node, a.aborted_tokens)
            for a in answers
            if a.train is None
        ]
        verdicts = self._agree(mine)
        kept = [v for v in verdicts if v.keep]
        aborted = sorted(v.index for v in verdicts if v.reason is None)
        counts.update(kept=len(kept), aborted=len(aborted), tokens_aborted=sum(v.aborted_tokens for v in verdicts))
        counts.update(f"{DROPPED}{v.reason}" for v in verdicts if not v.keep and v.reason is not None)
        self.in_flight -= {v.index for v in verdicts}
        self.again += aborted
        return kept

    def _score(self, answers: list[Answer], clock: Clock) -> list[Group]:
        """The groups of what was not aborted."""
        train = [(a.prompt, a.train) for a in answers if a.train is not None]
        greedy = [(a.prompt, a.greedy) for a in answers if a.greedy is not None]
        if self.grader is None or not train:
            return []
        with clock.time("reward"):
            groups = self.grader(train)
            if not greedy:
                return groups
            return [replace(g, baseline=b.members[0]) for g, b in zip(groups, self.grader(greedy), strict=True)]

    def _decide(self, group: Group, version: int) -> Decision:
        if self._stale(group, version):
            return Decision(False, "stale")
        # A member without a score is not trained on, so its value of one function must not keep the group.
        scores = [None if m.score is None else m.metric(self.filter.metric_to_filter) for m in group.members]
        if not self.filter.enable:
            scored = any(score is not None for score in scores)
            return Decision(scored, "kept" if scored else "unscorable")
        decision: object = self.keep(scores)
        # A reason that is no text would be taken for an aborted prompt, which is asked again.
        if isinstance(decision, Decision) and isinstance(decision.keep, bool) and isinstance(decision.reason, str):
            return decision
        raise ValueError(
            f"algorithm.filter_groups.filter: {REGISTRY.label(self.filter.filter)} returned {decision!r:.80}: it must "
            "return grpo_ds.filters.Decision(keep, reason) with True or False and a word to count by"
        )

    def _verdict(self, group: Group, decision: Decision, version: int) -> Verdict:
        oldest = min((v for v in group.versions if v >= self._oldest(version)), default=version)
        return Verdict(group.prompt.index, decision.keep, decision.reason, oldest, self.ranks.node)

    def _agree(self, mine: list[Verdict]) -> list[Verdict]:
        """All nodes' verdicts, on every rank."""
        rows: list[Any] = [[v.index, v.keep, v.reason, v.version, v.node, v.aborted_tokens] for v in mine]
        return [Verdict(*row) for part in self.ranks.all_gather(rows, "filter verdicts") for row in part]

    def _exhausted(self, round_index: int, counts: Counter[str], have: int, needed: int) -> None:
        if have and self.filter.on_exhausted == "train_partial":
            return
        if self.filter.enable:
            advice = "use easier or harder prompts, raise rollout.n or the limit"
        else:
            advice = "look at the reward functions, or raise the limit"
        if have:
            advice += ", or set on_exhausted: train_partial"
        raise Exhausted(
            f"round {round_index}: {counts['batches']} generation batches (algorithm.filter_groups.max_num_gen_batches)"
            f" gave {self._found(counts, have, needed)}: {advice}"
        )

    def _found(self, counts: Counter[str], have: int, needed: int) -> str:
        """`3 of 8 groups whose scores differ (3 kept, 5 all_wrong)`."""
        fates = ("kept", *(name for name in counts if name.startswith(DROPPED)))
        seen = ", ".join(f"{counts[name]} {name.removeprefix(DROPPED)}" for name in fates if counts[name])
        wanted = "that the filter keeps" if self.filter.enable else "with a score"
        return f"{have} of {needed} groups {wanted} ({seen or 'no group at all'})"
