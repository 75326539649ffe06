"""What a round asks of its models, and what it does between micro-batches."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ds import loop
from grpo_ds.balance import assign
from grpo_ds.batching import MicroBatch
from grpo_ds.clock import Clock
from grpo_ds.collect import Collection
from grpo_ds.config import ActorConfig, DataConfig, ImportanceConfig, ModelConfig, Recipe, RewardConfig, TrainConfig
from grpo_ds.engine.base import EngineError
from grpo_ds.estimators import get_estimator
from grpo_ds.losses import KlController, get_policy_loss
from grpo_ds.objective import Objective
from grpo_ds.samples import AdvantageStage
from grpo_ds.types import Group, Prompt, Rollout, Scored, VersionSpan

COEF = 0.5


class Alone:
    """The only rank."""

    rank, world, node, nodes, where = 0, 1, 0, 1, "test"

    def all_gather(self, value: Any, what: str) -> list[Any]:
        return [value]

    def exchange(self, outgoing: list[bytes], what: str) -> list[bytes]:
        return outgoing

    def sum(self, values: Tensor, what: str) -> Tensor:
        return values

    max = sum


class Model:
    """Every token has log-probability `level`; a step lowers it by 1. Counts its passes without gradient."""

    device = torch.device("cpu")

    def __init__(self, level: float) -> None:
        self.level, self.passes = torch.tensor(level, requires_grad=True), 0
        self.gradients: list[float] = []

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        lp = self.level.expand(micro.targets.shape)
        return lp, lp.detach()

    def logprobs(self, micro: MicroBatch) -> Tensor:
        self.passes += 1
        return self.forward(micro)[1]

    def backward(self, share: Tensor) -> None:
        share.backward()

    def step(self) -> float:
        assert self.level.grad is not None
        self.gradients.append(self.level.grad.item())
        self.level = (self.level.detach() - 1).requires_grad_()
        return 1.0


def group(index: int, *lengths: int) -> Group:
    """The k-th response is k + 1 to good; the first one is cut off."""
    members = [
        Scored(
            Rollout((5,) * n, (-1.0,) * n, "stop" if k else "length", (VersionSpan(0, 0, n),), ""), k + 1.0, k + 1.0, {}
        )
        for k, n in enumerate(lengths)
    ]
    return Group(Prompt(index, index, (1,), "", {}), tuple(members))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("steps", "placement"), [(1, "reward"), (2, "reward"), (2, "loss")])
def test_each_model_makes_one_pass_a_round_over_a_micro_batch(steps: int, placement: Any, masked: bool) -> None:
    actor, reference, ranks = Model(-1.0), Model(-3.0), Alone()
    recipe = Recipe(
        model=ModelConfig(path="m"),
        data=DataConfig(train="t", max_prompt_tokens=4),
        reward=RewardConfig(functions=["f"]),
        train=TrainConfig(prompts_per_round=2, prompts_per_update=2 // steps, micro_batch_tokens=2048),
        actor=ActorConfig(kl_loss_coef=COEF, kl_loss_type="k1", kl_placement=placement),
    )
    used = {
        "ranks": ranks,
        "advantage": AdvantageStage(get_estimator("dr_grpo"), mask_truncated=masked),
        "objective": Objective(get_policy_loss("vanilla"), recipe.actor, ImportanceConfig(level="off")),
        "actor": actor,
        "reference": reference,
        "kl": KlController(COEF, None, 1),
        "layout": "packed",
        "check_engine": lambda: None,
    }
    parts = loop.Parts(**{field.name: used.get(field.name) for field in fields(loop.Parts)})  # type: ignore[arg-type]
    groups = [group(0, 1, 2), group(1, 3, 1)]
    samples, known = loop.advantages(recipe, parts, Collection(groups, [0, 1], {}, groups), Clock())
    # Rewards 1 and 2 a response; a KL of 2 a token, half of which comes off where it belongs to the reward.
    off = [1, 2, 3, 1] if placement == "reward" else [0] * 4
    shaped = [1.0 - off[0], 2.0 - off[1], 1.0 - off[2], 2.0 - off[3]]
    wanted = [(a - b) / 2 for a, b in (shaped[:2], shaped[1::-1], shaped[2:], shaped[:1:-1])]
    assert [sample.advantages[-1].item() for sample in samples] == pytest.approx(wanted)
    work = assign(recipe, ranks, "packed", [0, 1], samples)  # type: ignore[arg-type]
    assert sum(len(step.micro_batches[0]) for step in work.plan) == steps
    loop.update(parts, work, 0, Clock(), known)
    again = placement == "reward" and masked  # other tokens are left, so the values of the drafts do not fit
    drafts = steps if placement == "reward" else 0
    assert reference.passes == drafts + (steps if again or placement == "loss" else 0)
    assert actor.passes == drafts + (steps if steps > 1 and (again or placement == "loss") else 0)
    assert len(actor.gradients) == steps
    if steps == 2:
        # The second step's ratio to the start of the round is e^-1, clipped below 0.8 where the advantage is negative.
        with_loss = COEF if placement == "loss" else 0.0
        tokens = [(wanted[2], 3 * (not masked)), (wanted[3], 1)]
        slope = sum(-a * n * (1 if a > 0 else 0) * 2.718281828**-1 for a, n in tokens) / sum(n for _, n in tokens)
        assert actor.gradients[1] == pytest.approx(slope + with_loss, abs=1e-5)


class CountingActor:
    """Counts what is asked of it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.backwards = 0

    def forward(self, micro: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(1), torch.zeros(1)

    def backward(self, share: Tensor) -> None:
        self.backwards += 1


def test_a_dead_engine_ends_the_update_at_the_next_micro_batch() -> None:
    actor, asked = CountingActor(), []

    def check() -> None:
        asked.append(actor.backwards)
        if len(asked) == 3:
            raise EngineError("gone")

    parts: Any = SimpleNamespace(
        actor=actor,
        reference=None,
        check_engine=check,
        objective=lambda *_, **__: (torch.zeros(()), {}),
        kl=SimpleNamespace(coef=0.0),
        ranks=SimpleNamespace(rank=0),
        layout="padded",
    )
    plan = [SimpleNamespace(totals=SimpleNamespace(tokens=5))]
    work: Any = SimpleNamespace(plan=plan, micro_batches=lambda *_: [[None] * 5])
    with pytest.raises(EngineError, match="gone"):
        loop.update(parts, work, 0, Clock())
    assert asked == [0, 1, 2], "before each of the first three"
