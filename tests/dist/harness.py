"""Runs a function as W real ranks: one process a rank, the variables a launcher would set, a deadline, results as files.

Starting a rank takes seconds (torch, DeepSpeed), so a worker runs many cases and returns all of their results at once.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grpo_ds.processes import leave

ROOT = Path(__file__).resolve().parents[2]


class RankFailed(AssertionError):
    """A rank ended with an error, or not at all; the message holds the end of its log."""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    target: str, world: int, folder: Path, *, local_world: int | None = None, timeout_s: float = 500.0
) -> list[Any]:
    """What `target` ("package.module:function", called with `folder`) returned on each rank, in rank order.

    local_world: ranks of a node; less than `world` makes this machine look like several nodes. Results may hold tensors
    and plain values. Raises RankFailed when a rank fails or the deadline passes; no process outlives the call.
    """
    local_world = local_world or world
    run = folder / f"{target.replace(':', '.')}-{world}"
    run.mkdir(parents=True)
    shared = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "LOCAL_SIZE": str(local_world),  # as DeepSpeed's launcher; without it each backward on a CPU starts numactl
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HARNESS_DUMP_S": str(timeout_s * 0.6),
    }
    ranks = []
    for rank in range(world):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % local_world)}
        command = [sys.executable, "-m", "tests.dist.harness", target, str(folder), str(run / f"{rank}.pt")]
        with open(run / f"{rank}.log", "wb") as log:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        _wait(ranks, run, target, time.monotonic() + timeout_s, timeout_s)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [torch.load(run / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _wait(ranks: list[subprocess.Popen[bytes]], run: Path, target: str, deadline: float, timeout_s: float) -> None:
    while any(process.poll() is None for process in ranks):
        failed = [r for r, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed:
            break
        if time.monotonic() > deadline:
            late = [r for r, process in enumerate(ranks) if process.poll() is None]
            logs = "\n".join(_log(run, r) for r in late)
            raise RankFailed(f"{target}: ranks {late} of {len(ranks)} had not ended after {timeout_s:g} s\n{logs}")
        time.sleep(0.05)
    failed = [r for r, process in enumerate(ranks) if process.poll() not in (None, 0)]
    if failed:
        logs = "\n".join(_log(run, r) for r in failed)
        raise RankFailed(f"{target}: ranks {failed} of {len(ranks)} failed\n{logs}")


def _log(run: Path, rank: int) -> str:
    return f"--- rank {rank}\n" + (run / f"{rank}.log").read_text(errors="replace")[-4000:]


def meet(folder: Path, what: str, timeout_s: float = 120.0) -> None:
    """Waits by files until every rank is here; for workers whose own deadlines are shorter than a process start."""
    world = int(os.environ["WORLD_SIZE"])
    (folder / f"{what}-{world}-{os.environ['RANK']}").touch()
    deadline = time.monotonic() + timeout_s
    while len(list(folder.glob(f"{what}-{world}-*"))) < world:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {world} ranks came to `{what}` within {timeout_s:g} s")
        time.sleep(0.02)


def _main(target: str, folder: str, result: str) -> None:
    # A log that shows where a late rank waited.
    faulthandler.dump_traceback_later(float(os.environ["HARNESS_DUMP_S"]), exit=False)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's words about DeepSpeed's calls, one a call
    module, _, name = target.partition(":")
    function: Callable[[Path], Any] = getattr(importlib.import_module(module), name)
    torch.save(function(Path(folder)), result)
    leave(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
