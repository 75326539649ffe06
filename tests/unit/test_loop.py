"""What the loop does between micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_ds.clock import Clock
from grpo_ds.engine.base import EngineError
from grpo_ds.loop import update


class Actor:
    """Counts what is asked of it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.backwards = 0

    def forward(self, micro: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1), torch.zeros(1)

    def backward(self, share: torch.Tensor) -> None:
        self.backwards += 1


def test_a_dead_engine_ends_the_update_at_the_next_micro_batch() -> None:
    actor, asked = Actor(), []

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
    work: Any = SimpleNamespace(plan=[SimpleNamespace(totals=None)], micro_batches=lambda *_: [[None] * 5])
    with pytest.raises(EngineError, match="gone"):
        update(parts, work, 0, Clock())
    assert asked == [0, 1, 2], "before each of the first three"
