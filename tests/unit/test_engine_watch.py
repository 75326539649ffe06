"""A dead engine is noticed while the trainer computes, and asked about only now and then."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_ds import evaluate
from grpo_ds.engine.base import EngineError
from grpo_ds.evaluate import EngineWatch


class Engine:
    """Lives as long as it is told to; counts the questions."""

    def __init__(self) -> None:
        self.lives, self.asked = True, 0

    def alive(self) -> bool:
        self.asked += 1
        return self.lives


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=lambda: clock.now))
    assert time.monotonic() > 0, "nobody else's clock stands still"
    return clock


def test_an_engine_that_dies_in_a_long_update_is_noticed_within_twenty_seconds(now: SimpleNamespace) -> None:
    """Micro-batches of half a second; the engine dies in the 100th of them."""
    engine: Any = Engine()
    watch = EngineWatch(engine, restarts=False)
    with pytest.raises(EngineError, match="this node's engine died while the trainer computed"):
        for k in range(1000):
            engine.lives = k < 100
            now.now += 0.5
            watch()
    assert 1050 < now.now <= 1070
    assert engine.asked <= 14, "once in 5 seconds"


def test_one_lost_answer_is_no_death(now: SimpleNamespace) -> None:
    engine: Any = Engine()
    watch = EngineWatch(engine, restarts=False)
    for k in range(20):
        engine.lives = k % 2 == 0
        now.now += 6
        watch()
    assert engine.asked == 20


@pytest.mark.parametrize("restarts", [True, False])
def test_an_engine_that_may_be_restarted_or_is_another_ranks_is_left_alone(
    now: SimpleNamespace, restarts: bool
) -> None:
    engine: Any = Engine()
    engine.lives = False
    watch = EngineWatch(engine if restarts else None, restarts=restarts)
    for _ in range(20):
        now.now += 6
        watch()
    assert engine.asked == 0
