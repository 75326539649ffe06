"""Whose turn it is to hold the device's memory, and what a leak is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from grpo_ds.colocation import Colocation, MemoryDrift, SleepFailed
from grpo_ds.config import EngineConfig

GIB = 2**30


class Ranks:
    """One rank; `others` is what all others say about the memory that sleep freed."""

    rank, node, where = 0, 0, "round 3"
    others: Sequence[Any] = ()

    def all_gather(self, value: Any, what: str) -> list[Any]:
        return [value, *(self.others if what == "memory that sleep freed" else [])]


class Sleeper:
    """An engine of `servers` that only sleeps, and frees 8 GiB by it."""

    def __init__(self, device: list[int], fails: bool = False, frees: int = 8 * GIB, servers: int = 1) -> None:
        self.device = device
        self.fails = fails
        self.frees = frees
        self.servers = servers
        self.naps = 0

    def sleep(self) -> int:
        if self.fails:
            raise RuntimeError("out of order")
        self.naps += 1
        self.device[0] += self.frees
        return self.servers


def colocation(
    device: list[int], engine: Sleeper, measured: bool = True, weights: int = 3 * GIB, ranks: Any = None, **config: Any
) -> Colocation:
    who: Any = ranks or Ranks()
    made: Any = Colocation(
        EngineConfig(**{"sleep": True} | config),
        who,
        engine,  # type: ignore[arg-type]
        (lambda: device[0]) if measured else None,
        weights,
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


@pytest.mark.parametrize("freed", [0, 3 * GIB - 1])
def test_an_engine_that_only_says_that_it_sleeps_is_an_error_that_names_the_phase(freed: int) -> None:
    device = [20 * GIB]
    parts = colocation(device, Sleeper(device, frees=freed))
    with pytest.raises(
        SleepFailed, match=r"phase `sleep`: the engine of node 0 .* less than the 3.00 GiB of its weights"
    ):
        parts.after("generate")


def test_the_weights_alone_are_enough() -> None:
    device = [20 * GIB]
    colocation(device, Sleeper(device, frees=3 * GIB)).after("generate")


def test_what_sleep_freed_is_counted_over_the_devices_of_a_node() -> None:
    """Two servers of 8 GiB on two ranks' devices: this one gets 8 GiB back, and the other one's count decides."""
    device, ranks = [20 * GIB], Ranks()
    parts = colocation(device, Sleeper(device, servers=2), weights=8 * GIB, ranks=ranks, replicas=2)
    ranks.others = [[0, 8 * GIB], [1, 7 * GIB], [1, 9 * GIB]]
    parts.after("generate")
    ranks.others = [[0, 8 * GIB], [1, 7 * GIB], [1, 8 * GIB]]
    with pytest.raises(SleepFailed, match=r"node 1 .* 15.00 GiB .* less than the 16.00 GiB"):
        parts.after("generate")


def test_a_node_with_a_server_down_is_not_accused_of_keeping_its_memory() -> None:
    """One of two servers died in the generation, which the run allows: sleep frees the weights of the other one."""
    device, ranks = [20 * GIB], Ranks()
    engine = Sleeper(device, servers=1)
    parts = colocation(device, engine, weights=9 * GIB, ranks=ranks, replicas=2)
    parts.after("generate")
    ranks.others = [[1, 7 * GIB]]
    with pytest.raises(SleepFailed, match="the engine of node 1 says that it sleeps, and 7.00 GiB"):
        parts.after("generate")
    engine.servers, ranks.others = 2, []
    with pytest.raises(SleepFailed, match="the engine of node 0 says that it sleeps, and 8.00 GiB"):
        parts.after("generate")


def test_a_rank_that_sees_one_of_an_engines_two_devices_expects_half_of_the_weights() -> None:
    device = [20 * GIB]
    colocation(device, Sleeper(device), weights=16 * GIB, args={"tensor_parallel_size": 2}).after("generate")
    parts = colocation(device, Sleeper(device), weights=17 * GIB, args={"tensor_parallel_size": 2})
    with pytest.raises(SleepFailed, match=r"8.00 GiB .* less than the 8.50 GiB"):
        parts.after("generate")
