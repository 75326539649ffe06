"""Optimizer steps of which every token is masked: nothing may move, and the rest of the round is as without them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ds import loop
from grpo_ds.actor.policy import Policy
from grpo_ds.balance import assign
from grpo_ds.clock import Clock
from grpo_ds.collect import Collection
from grpo_ds.config import ActorConfig, DataConfig, ImportanceConfig, ModelConfig, Recipe, RewardConfig, TrainConfig
from grpo_ds.estimators import get_estimator
from grpo_ds.losses import KlController, get_policy_loss
from grpo_ds.objective import Objective
from grpo_ds.runlog import RunLog
from grpo_ds.samples import AdvantageStage
from grpo_ds.types import Group
from tests.unit.test_loop import Alone
from tests.unit.test_staleness import group, member

CPU = torch.device("cpu")
WARMUP = 4
COEF, TARGET = 0.1, 0.05
RECIPE = Recipe(
    model=ModelConfig(path="m"),
    data=DataConfig(train="t", max_prompt_tokens=4),
    reward=RewardConfig(functions=["f"]),
    actor=ActorConfig(lr=0.5, lr_warmup_steps=WARMUP, weight_decay=0.1, kl_loss_coef=COEF, kl_target=TARGET),
    train=TrainConfig(rounds=2, prompts_per_round=3, prompts_per_update=1, micro_batch_tokens=2048),
)


class Engine:
    """What the policy asks of DeepSpeed, around one weight: the log-probability of every token."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.tensor(-1.0))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.5, weight_decay=0.1)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        lp = self.weight.expand(inputs[-1].shape).clone()
        return lp, lp.detach()

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return 1.0


def policy() -> Policy:
    return Policy(Engine(), CPU, RECIPE.actor, world=1)


class Reference:
    """A nat below the policy's start."""

    def logprobs(self, micro: Any) -> Tensor:
        return torch.full(micro.targets.shape, -2.0)


def one_group(index: int, finish: str = "stop") -> Group:
    """Three tokens at advantage 1/2 and one at -1/2, so the gradient is not 0."""
    return group(member([0] * 3, 1.0, finish), member([0], 0.0, finish), index=index)


def parts_of(actor: Policy, **more: Any) -> loop.Parts:
    used = {
        "ranks": Alone(),
        "advantage": AdvantageStage(get_estimator("dr_grpo"), mask_truncated=True),
        "objective": Objective(get_policy_loss("vanilla"), RECIPE.actor, ImportanceConfig(level="off")),
        "actor": actor,
        "reference": Reference(),
        "kl": KlController(COEF, TARGET, 1),
        "layout": "packed",
        "check_engine": lambda: None,
        **more,
    }
    return loop.Parts(**{field.name: used.get(field.name) for field in fields(loop.Parts)})  # type: ignore[arg-type]


def updated(groups: Sequence[Group]) -> tuple[Policy, dict[str, Tensor], list[float]]:
    actor = policy()
    parts = parts_of(actor)
    order = [g.prompt.index for g in groups]
    samples = parts.advantage(groups)
    work = assign(RECIPE, parts.ranks, "packed", order, samples)
    assert len(work.plan) == len(groups)
    return actor, *loop.update(parts, work, 0, Clock())


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_step_without_a_token_changes_nothing(empty: int) -> None:
    """Momentum, weight decay and the warm-up are those of the two other steps, wherever it comes."""
    others = [k for k in range(3) if k != empty]
    alone, wanted, _ = updated([one_group(k) for k in others])
    actor, stats, norms = updated([one_group(k, "length" if k == empty else "stop") for k in range(3)])
    assert actor.engine.weight.item() == alone.engine.weight.item() != -1.0
    assert (actor.steps_taken, norms) == (2, [1.0, 1.0])
    assert actor.lr == pytest.approx(0.5 * 2 / WARMUP)
    assert stats.keys() == wanted.keys() and all(torch.equal(stats[name], wanted[name]) for name in stats)


def test_a_round_without_a_token_is_written_down_and_the_next_one_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A KL of 0, which nobody measured, would lower its coefficient by a fifth; the second round's KL raises it by one."""
    rounds = [[one_group(3 * r + k, "length" if r == 0 else "stop") for k in range(3)] for r in range(2)]
    actor, kl = policy(), KlController(COEF, TARGET, 1)
    published: list[int] = []
    after: list[tuple[float, float]] = []

    def publish(version: int) -> dict[str, float]:
        published.append(version)
        return {}

    parts = parts_of(
        actor,
        collector=SimpleNamespace(
            collect=lambda r, *_: Collection(rounds[r], [g.prompt.index for g in rounds[r]], {}, rounds[r])
        ),
        colocation=SimpleNamespace(after=lambda phase: None, metrics=dict),
        publisher=SimpleNamespace(publish=publish),
        parity=SimpleNamespace(require=lambda: None),
        log=RunLog(tmp_path, RECIPE, is_main=True, node=0, first_round=0),
        evaluate=lambda done: {},
        kl=kl,
        after_round=lambda *_: after.append((kl.coef, actor.engine.weight.item())),
        counts=dict,
        reward_functions=(),
    )
    assert loop.train(RECIPE, parts, 0, 0) == 2 and published == [1, 2]
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["optimizer_steps"], first["optimizer_steps_skipped"], first["tokens_trained"]) == (0, 3, 0)
    assert first["loss"] is first["grad_norm"] is first["entropy"] is None and "kl" not in first
    assert (second["optimizer_steps"], second["optimizer_steps_skipped"], second["tokens_trained"]) == (3, 0, 12)
    assert after[0] == (COEF, -1.0) and actor.steps_taken == 3
    assert second["kl"] > 1.2 * TARGET and after[1][0] == pytest.approx(COEF * 1.2) and after[1][1] != -1.0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round")]
    assert "loss -  grad -  gap 0.0e+00" in lines[0] and "grad 1.000  gap" in lines[1]
