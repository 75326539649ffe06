"""What tests see of a job that runs, and how long they wait for it."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from tests.e2e.harness import Launched, read_jsonl
from tests.slurm.cluster import Job, command_line, wait_for

START_S = 300.0
"""Deadline for a job to get where a test wants it; generous, because two CPUs carry both nodes."""
ENDS_S = 30.0
"""Deadline for all processes of a job to end, SLURM's own waiting included."""


EXACT = ("loss", "reward", "score_all", "kept_groups", "dropped_groups", "tokens_trained")


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two rounds with the same numbers."""
    for key in EXACT:
        assert other[key] == pytest.approx(one[key], abs=1e-5), key
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def metrics(job: Job | Launched) -> list[dict[str, Any]]:
    return read_jsonl(job.folder / "metrics.jsonl")


def wait_rounds(job: Job, count: int) -> None:
    def reached() -> bool:
        assert job.state in ("PENDING", "RUNNING", "CONFIGURING"), f"{job.state}\n{job.screen}"
        return job.rounds() >= count

    wait_for(f"round {count} of job {job.number}", reached, START_S)


def nothing_left(job: Job) -> None:
    wait_for(f"the end of all processes of job {job.number}", lambda: not job.processes(), ENDS_S)


def is_rank(process: psutil.Process) -> bool:
    """python launch/train.py ..., but not a child that was forked from one; srun names the script further behind."""
    chain = [process, *process.parents()[:1]]
    return [command_line(p).split()[1:2] == ["launch/train.py"] for p in chain] == [True, False]
