"""A job that SLURM preempts for another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.pace import Pace
from tests.slurm.watching import nothing_left, wait_rounds

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_a_preempted_job_writes_a_checkpoint_within_its_grace_time(
    cluster: Cluster, home: Path, recipe: Path, pace: Pace
) -> None:
    """SLURM sends SIGTERM to the ranks; the job that waits gets the nodes as soon as the ranks have ended."""
    pace.slow()
    options = ["--train.rounds", "500", "--train.checkpoint_every", "0"]
    job = cluster.submit(home, "--exclusive", arguments=["--recipe", str(recipe), *options])
    wait_rounds(job, 1)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1000"]
    cluster.command(*urgent, cwd=home)
    wait_for(f"job {job.number} queued again:\n{job.screen}", lambda: job.state == "PENDING", 120)
    nothing_left(job)
    assert job.show("Restarts") == "1"
    assert "stopped: on request, after round" in job.screen, job.screen
    (checkpoint,) = (job.folder / "checkpoints").glob("round-*")
    assert checkpoint.name == f"round-{job.rounds():06d}"
    wait_for("the other job's turn", lambda: "R" in cluster.command("squeue", "-h", "-p", "urgent", "-o", "%t"), 60)
