"""The loop's own road with the KL in the reward: drafts -> assign -> penalties -> home -> advantages -> assign -> update.

The functions of `grpo_ds.loop` run as they do in a round, on groups instead of an engine's responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from grpo_ds import balance, loop
from grpo_ds.actor.policy import Policy, Scorer
from grpo_ds.batching import MicroBatch, UpdatePlan, plan_updates
from grpo_ds.clock import Clock
from grpo_ds.collect import Collection
from grpo_ds.config import DataConfig, ModelConfig, Recipe, RewardConfig, RolloutConfig, TrainConfig
from grpo_ds.dist import Ranks
from grpo_ds.estimators import get_estimator
from grpo_ds.losses import KlController
from grpo_ds.samples import AdvantageStage
from grpo_ds.types import Group, Prompt, Rollout, Scored, VersionSpan
from tests.dist import cases
from tests.dist.cases import GROUPS, KL_COEF, MAX_RESPONSE_TOKENS, PROMPT_TOKENS, GradientCase
from tests.dist.parts import Raw, actor_of, gradient_of, make_objective, reordered


class Remembered:
    """A frozen model that computes each answer once: cases that cut a round alike ask it for the same, in one order.

    A third of a launch's passes are theirs otherwise. All ranks run the same cases, so all of them know an answer or none.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._known: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        self._calls: Iterator[int] = count()
        self._answers: list[tuple[Tensor, Tensor]] = []

    def begin(self, case: GradientCase) -> None:
        """Before each case."""
        self._answers = self._known.setdefault((case.budget, case.layout, case.shuffle, case.old), [])
        self._calls = count()

    def logprobs(self, micro: MicroBatch, autocast: torch.dtype | None = None) -> Tensor:
        """(M,), as `Scorer.logprobs`."""
        call = next(self._calls)
        if call == len(self._answers):
            self._answers.append((micro.input_ids, self.scorer.logprobs(micro, autocast)))
        asked, answer = self._answers[call]
        assert torch.equal(asked, micro.input_ids), "cases of the same cut ask for other micro-batches"
        return answer


@dataclass(frozen=True)
class Frozen:
    """Models beside the one being trained."""

    start: Remembered
    """The policy as it was when the round began."""
    reference: Remembered


class Recorder(Policy):
    """Keeps the gradient of each step. With `start` it has moved since the round began, as after many steps."""

    def __init__(self, policy: Policy, start: Remembered | None) -> None:
        super().__init__(policy.engine, policy.device, policy.actor, policy.world)
        self.start = start
        self.gradients: list[dict[str, Tensor]] = []

    def logprobs(self, micro: MicroBatch, autocast: torch.dtype | None = None) -> Tensor:
        return self.start.logprobs(micro, autocast) if self.start else super().logprobs(micro, autocast)

    def step(self) -> float:
        self.gradients.append(gradient_of(self))
        return super().step()


def round_gradients(
    case: GradientCase, policy: Policy, frozen: Frozen, ranks: Ranks, raw: Raw
) -> tuple[list[dict[str, Tensor]], list[float], list[UpdatePlan]]:
    """Gradients, norms and plans of the optimizer steps of a round."""
    recipe = _recipe(case)
    frozen.start.begin(case)
    frozen.reference.begin(case)
    actor = Recorder(policy, frozen.start if case.old else None)
    parts = _parts(case, actor, frozen.reference, ranks)
    groups = _groups(case, ranks, raw)
    collection = Collection(groups, sorted(set(GROUPS)), {}, groups)
    with _order(case.shuffle):
        with _mistake(case.mistake, ranks):
            samples, known = loop.advantages(recipe, parts, collection, Clock())
        work = balance.assign(recipe, ranks, parts.layout, collection.order, samples)
    _, norms = loop.update(parts, work, 0, Clock(), known)
    return actor.gradients, norms, work.plan


def _recipe(case: GradientCase) -> Recipe:
    groups = len(set(GROUPS))
    return Recipe(
        model=ModelConfig(path="given"),
        data=DataConfig(train="given", max_prompt_tokens=PROMPT_TOKENS),
        reward=RewardConfig(functions=["given"]),
        rollout=RolloutConfig(n=2, max_response_tokens=MAX_RESPONSE_TOKENS),
        actor=actor_of(case),
        train=TrainConfig(
            prompts_per_round=groups,
            prompts_per_update=groups // 2 if case.old else None,
            micro_batch_tokens=case.budget,
        ),
    )


def _parts(case: GradientCase, actor: Policy, reference: Remembered, ranks: Ranks) -> loop.Parts:
    name, _ = case.spread
    estimator = get_estimator(name, **({"gamma": cases.GAMMA} if name == "reinforce_plus_plus" else {}))
    whole_batch = getattr(estimator, "whole_batch", False)
    used = {
        "ranks": ranks,
        "advantage": AdvantageStage(
            estimator,
            mask_truncated=True,
            all_reduce=partial(ranks.sum, what="estimator") if whole_batch else None,
        ),
        "objective": make_objective(case),
        "actor": actor,
        "reference": reference,
        "kl": KlController(KL_COEF, None, 1),
        "layout": case.layout,
        "check_engine": lambda: None,
    }
    # This stretch of the loop starts no engine and writes nothing.
    return loop.Parts(**{field.name: used.get(field.name) for field in fields(loop.Parts)})  # type: ignore[arg-type]


def _groups(case: GradientCase, ranks: Ranks, raw: Raw) -> list[Group]:
    """The groups that this rank made: those of its node's engine, or with a shuffle one of any rank's, turned around."""
    members: dict[int, list[Scored]] = {}
    for i, group in enumerate(GROUPS):
        owner = (group + 1) % ranks.world if case.shuffle else group % ranks.nodes * ranks.local_world
        if owner == ranks.rank:
            members.setdefault(group, []).append(_scored(raw[i], "length" if i == cases.TRUNCATED else "stop"))
    first = {group: raw[GROUPS.index(group)] for group in members}
    return [
        Group(
            Prompt(group, group, tuple(first[group]["token_ids"][:PROMPT_TOKENS].tolist()), "", {}),
            tuple(reversed(found) if case.shuffle else found),
        )
        for group, found in members.items()
    ]


def _scored(raw: dict[str, Tensor], finish: Any) -> Scored:
    mask = raw["response_mask"]
    tokens, logprobs = raw["token_ids"][mask].tolist(), raw["rollout_logprobs"][mask].tolist()
    reward = None if raw["reward"].isnan() else float(raw["reward"])
    rollout = Rollout(tuple(tokens), tuple(logprobs), finish, (VersionSpan(0, 0, len(tokens)),), "")
    return Scored(rollout, reward, reward, {})


@contextmanager
def _order(seed: int) -> Iterator[None]:
    """Has every plan handed out in another order."""

    def plans(*sizes: Any, **how: Any) -> list[UpdatePlan]:
        return [reordered(plan, seed) if seed else plan for plan in plan_updates(*sizes, **how)]

    with patch.object(balance, "plan_updates", plans):
        yield


@contextmanager
def _mistake(name: str, ranks: Ranks) -> Iterator[None]:
    """What a wrong way home would do to the penalties."""
    if not name:
        yield
        return

    def home(work: Any, at: Ranks, values: list[list[Tensor]]) -> Any:
        if name == "lost_penalties":
            lost = ranks.rank == ranks.world - 1
            return balance.per_token_home(work, at, [[v * (0.0 if lost else 1.0) for v in row] for row in values])
        return balance.per_token_home(work, at, values)[::-1]

    with patch.object(loop, "per_token_home", home):
        yield
