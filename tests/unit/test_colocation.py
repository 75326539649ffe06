"""Whose turn it is to hold the device's memory, and what a leak is."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_ds.colocation import Colocation, MemoryDrift, SleepFailed
from grpo_ds.config import EngineConfig

GIB = 2**30


class Ranks:
    """One rank that is alone."""

    rank, node, where = 0, 0, "round 3"

    def all_gather(self, value: Any, what: str) -> list[Any]:
        return [value]


class Sleeper:
    """An engine that only sleeps, and frees 8 GiB by it."""

    def __init__(self, device: list[int], fails: bool = False) -> None:
        self.device = device
        self.fails = fails
        self.naps = 0

    def sleep(self) -> None:
        if self.fails:
            raise RuntimeError("out of order")
        self.naps += 1
        self.device[0] += 8 * GIB


def colocation(device: list[int], engine: Sleeper, measured: bool = True, **config: Any) -> Colocation:
    made: Any = Colocation(
        EngineConfig(**{"sleep": True} | config),
        Ranks(),  # type: ignore[arg-type]
        engine,  # type: ignore[arg-type]
        (lambda: device[0]) if measured else None,
    )
    return made


def test_the_engine_sleeps_after_generation_and_every_edge_is_measured() -> None:
    device = [10 * GIB]
    engine = Sleeper(device)
    parts = colocation(device, engine)
    parts.after("generate")
    device[0] -= 5 * GIB
    parts.after("update")
    device[0] -= 8 * GIB
    parts.after("sync")
    assert engine.naps == 1
    assert parts.metrics() == {
        "memory/free_after_generate": 10,
        "memory/free_after_sleep": 18,
        "memory/free_after_update": 13,
        "memory/free_after_sync": 5,
    }


def test_a_phase_that_keeps_memory_from_round_to_round_is_named() -> None:
    device = [20 * GIB]
    parts = colocation(device, Sleeper(device), max_memory_drift_gb=2.0)
    for free in (20, 18, 17, 16):  # the first two rounds settle; 16 is 2 less than 18
        device[0] = free * GIB
        parts.after("update")
    device[0] = 15 * GIB
    with pytest.raises(MemoryDrift, match=r"round 3, phase `update`, rank 0: 15.00 GiB .* 3.00 less .*\(engine.max_"):
        parts.after("update")


def test_memory_that_comes_and_goes_is_no_leak() -> None:
    device = [20 * GIB]
    parts = colocation(device, Sleeper(device))
    for phase, free in [("update", 20), ("sync", 3), ("update", 20), ("sync", 3), ("update", 25), ("sync", 2.5)]:
        device[0] = int(free * GIB)
        parts.after(phase)


def test_where_the_engine_does_not_sleep_nothing_is_done() -> None:
    device = [20 * GIB]
    engine = Sleeper(device)
    parts = colocation(device, engine, sleep=False)
    parts.after("generate")
    assert engine.naps == 0 and parts.metrics() == {}


def test_on_a_cpu_the_engine_sleeps_and_nothing_is_measured() -> None:
    device = [20 * GIB]
    engine = Sleeper(device)
    parts = colocation(device, engine, measured=False)
    parts.after("generate")
    assert engine.naps == 1 and parts.metrics() == {}


def test_an_engine_that_cannot_sleep_is_an_error_on_every_rank() -> None:
    device = [20 * GIB]
    with pytest.raises(SleepFailed, match=r"round 3: an engine did not go to sleep: node 0: out of order"):
        colocation(device, Sleeper(device, fails=True)).after("generate")
