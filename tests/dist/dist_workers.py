"""Ranks that use grpo_ds.dist alone; torch starts much faster than DeepSpeed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from grpo_ds.dist import DistError, Ranks
from grpo_ds.metrics import reduce_stats
from grpo_ds.recipe import read_recipe
from grpo_ds.train import Run
from tests.dist.harness import meet

SHORT_S = 5.0


class Loaded(Exception):
    """The trainer would have loaded a model."""


def payload(sender: int, receiver: int) -> bytes:
    """Ragged: nothing at all, one byte, or many."""
    return bytes(range(256)) * (3 * sender) + b"\x00" * receiver if sender != receiver else b""


def gathered_value(rank: int) -> Any:
    """JSON values of unequal length, not only ASCII."""
    return [None, {"naïve": [1.5, "π" * 1000]}, "x"][rank % 3]


def statistics(rank: int) -> dict[str, torch.Tensor]:
    """Names that sort differently on each rank, of sums, of maxima and of a row of numbers."""
    own = {0: {"policy/a": 5.0}, 1: {"policy/z": 7.0, "policy/b_max": -4.0}, 2: {"policy/c_max": 3.0}}[rank % 3]
    values = {"loss": float(rank + 1), "policy/b_max": -9.0, **own}
    return {name: torch.tensor(value) for name, value in values.items()} | {"bins": torch.tensor([1.0, rank])}


def primitives(folder: Path) -> dict[str, Any]:
    """Every collective once."""
    meet(folder, "primitives")
    ranks = Ranks(120.0)
    ranks.connect("gloo")
    result = {
        "gathered": ranks.all_gather(gathered_value(ranks.rank), "test"),
        "broadcast": ranks.broadcast({"from": ranks.rank, "text": "ü" * 500}, "test"),
        "exchanged": [p.hex() for p in ranks.exchange([payload(ranks.rank, r) for r in range(ranks.world)], "test")],
        "empty": [p.hex() for p in ranks.exchange([b""] * ranks.world, "test")],
        "sum": ranks.sum(torch.tensor([float(ranks.rank), 1e-12], dtype=torch.float64), "test"),
        "max": ranks.max(torch.tensor([float(-ranks.rank)]), "test"),
        "statistics": reduce_stats(statistics(ranks.rank), ranks),
        "column": (ranks.column, _column(ranks) if ranks.nodes > 1 else []),
        "facts": [ranks.node, ranks.nodes, ranks.leads_node, ranks.is_main],
    }
    ranks.barrier("end")
    ranks.close()
    return result


def _column(ranks: Ranks) -> list[torch.Tensor]:
    """What arrives on each node's row of one memory, for two parts of unequal length at odd places."""
    memory = torch.full((ranks.nodes, 12), 255, dtype=torch.uint8)
    mine = [torch.full((3,), 10 + ranks.rank, dtype=torch.uint8), torch.full((5,), 20 + ranks.rank, dtype=torch.uint8)]
    ranks.column_gather(mine, [[row[1:4], row[5:10]] for row in memory], "test")
    return list(memory)


def stalled_peer(folder: Path) -> dict[str, Any]:
    """The last rank is alive but does not come; the others must not wait for ever."""
    meet(folder, "stalled")
    ranks = Ranks(SHORT_S)
    ranks.connect("gloo")
    ranks.where = "round 7"
    ranks.all_gather(0, "warm-up")
    start = time.monotonic()
    if ranks.rank == ranks.world - 1:
        meet(folder, "stalled-left", timeout_s=60.0)
        return {}
    try:
        ranks.all_gather("hello", "filter verdicts")
        message = "no error"
    except DistError as error:
        message = str(error)
    seconds = time.monotonic() - start
    meet(folder, "stalled-left", timeout_s=60.0)
    return {"message": message, "seconds": seconds}


def dead_peer(folder: Path) -> dict[str, Any]:
    """The last rank is gone, as after a crash."""
    meet(folder, "dead")
    ranks = Ranks(60.0)
    ranks.connect("gloo")
    ranks.where = "round 3"
    ranks.all_gather(0, "warm-up")
    if ranks.rank == ranks.world - 1:
        return {}
    start = time.monotonic()
    try:
        ranks.broadcast("hello", "run folder")
        ranks.barrier("weights")
        message = "no error"
    except DistError as error:
        message = str(error)
    return {"message": message, "seconds": time.monotonic() - start}


def unlike_nodes(folder: Path) -> dict[str, Any]:
    """Each rank is a node with a checkout of its own: <folder>/<rank>; what its trainer says instead of loading a model."""
    os.chdir(folder / os.environ["RANK"])
    run = Run()

    def loads() -> None:
        raise Loaded

    run._build_models = loads  # type: ignore[method-assign]
    try:
        run.build(*read_recipe(["--recipe", "tiny.yaml"]))
    except (DistError, Loaded) as error:
        return {"said": f"{type(error).__name__}: {error}"}
    finally:
        run.close()
    raise AssertionError("it went on")
