"""A test run that is killed leaves nothing behind: daemons and jobs end with it, the next run removes its namespaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import ROOT, wait_for
from tests.slurm.namespaces import abandoned, two_namespaces

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

CLUSTER = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster, wait_for

cluster = Cluster(Path(sys.argv[1]))
cluster.start()
cluster.command("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun --ntasks-per-node=1 sleep 1000")
wait_for("the job's tasks on both nodes", lambda: sum(p.name() == "sleep" for p in cluster.processes()) == 2, 60)
print("ready", flush=True)
time.sleep(1000)
"""
NAMESPACES = """
import subprocess, time
from tests.slurm.namespaces import inside, two_namespaces

with two_namespaces() as names:
    children = [subprocess.Popen(inside(name, "sleep", "1000")) for name in names]
    print("ready", *names, flush=True)
    time.sleep(1000)
"""


def killed_when_ready(script: str, *arguments: str) -> tuple[list[str], list[psutil.Process]]:
    """What the script printed, and what it had started by then."""
    run = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stdout is not None
    with run.stdout:
        try:
            ready, *words = run.stdout.readline().split() or [""]
            assert ready == "ready"
            return words, psutil.Process(run.pid).children(recursive=True)
        finally:
            run.kill()
            run.wait()


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_daemons_and_jobs_end_with_the_run_that_started_them(tmp_path: Path) -> None:
    _, started = killed_when_ready(CLUSTER, str(tmp_path / "slurm"))
    logs = [file.read_text(errors="replace") for file in (tmp_path / "slurm").glob("*.log")]
    assert len(logs) == 3, "slurmctld and both slurmd ran"
    assert len(started) >= 3 * 2 + 3 * 2, "each daemon under its guard, and on each node a task, its step and its srun"
    wait_for("the end of all that the killed run had started", lambda: not living(started), 30)


def test_the_next_run_removes_the_namespaces_of_a_killed_one_and_what_runs_in_them() -> None:
    names, started = killed_when_ready(NAMESPACES)
    assert set(names) <= set(abandoned())
    assert len(started) == 2 and living(started) == started
    with two_namespaces() as fresh:
        assert not set(names) & set(abandoned())
        assert not set(fresh) & set(abandoned()), "those in use are left alone"
    wait_for("the end of the processes in the namespaces", lambda: not living(started), 10)
