"""launch/slurm.sbatch on a real SLURM with two nodes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job, variable, wait_for
from tests.slurm.pace import Pace
from tests.slurm.watching import ENDS_S, START_S, is_rank, metrics, nothing_left, same, wait_rounds

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def queued_again(job: Job) -> None:
    wait_for(f"job {job.number} queued again:\n{job.screen}", lambda: job.state == "PENDING", 120)
    assert job.show("Restarts") == "1"
    nothing_left(job)


def test_two_jobs_at_once_of_which_slurm_stops_one_before_its_time_limit_and_a_user_cancels_the_other(
    cluster: Cluster, home: Path, recipe: Path, pace: Pace
) -> None:
    """Two tasks of an array, each on both nodes, with the same seed.

    One gets a time limit: SLURM's signal makes it write a checkpoint and wait in the queue. The other one goes on
    undisturbed until it is cancelled, which leaves nothing of it behind and does not touch the first one, which resumes
    and finishes. Both have the same losses in every round.
    """
    rounds = 40
    pace.slow()
    arguments = ["--recipe", str(recipe), "--train.rounds", str(rounds), "--train.checkpoint_every", "0"]
    array = cluster.submit(home, "--array=0-1", "--time=60", "--signal=B:USR1@90", arguments=arguments)
    tasks = [Job(cluster, f"{array.number}_{k}", home) for k in range(2)]
    for task in tasks:
        wait_rounds(task, 1)
    assert [task.state for task in tasks] == ["RUNNING", "RUNNING"]
    # The last task to start bears the number of the whole array, which must not be queued again with it.
    (whole,) = [task for task in tasks if task.show("JobId") == array.number]
    (other,) = [task for task in tasks if task is not whole]
    cluster.command("scontrol", "update", f"JobId={whole.number}", f"TimeLimit={whole.minutes() + 2}")
    queued_again(whole)
    done = whole.rounds()
    assert 1 <= done < rounds, "it stopped between two rounds, before its end"
    (checkpoint,) = (whole.folder / "checkpoints").glob("round-*")
    assert checkpoint.name == f"round-{done:06d}"
    assert "stopped: on request" in whole.screen

    wait_rounds(other, done + 2)
    assert {variable(p, "SLURMD_NODENAME") for p in other.processes()} == {"n1", "n2"}
    cluster.command("scancel", other.number)
    assert other.wait(ENDS_S) == "CANCELLED"
    nothing_left(other)
    assert other.show("Restarts") == "0" and whole.state == "PENDING"

    pace.free()
    cluster.command("scontrol", "update", f"JobId={whole.number}", "TimeLimit=60")
    whole.start_now()
    assert whole.wait(START_S) == "COMPLETED", whole.screen
    assert whole.show("Restarts") == "1"
    assert f"resumed from {checkpoint}" in whole.screen
    assert (whole.folder / "summary.json").is_file()
    assert [m["round"] for m in metrics(whole)] == list(range(rounds))
    together = len(metrics(other))
    assert done + 2 <= together < rounds
    for one, two in zip(metrics(other), metrics(whole)[:together], strict=True):
        same(one, two)
    ports = {task.screen.partition("meeting at ")[2].partition(",")[0] for task in tasks}
    assert len(ports) == 2, ports


def test_a_lost_node_ends_the_job_which_goes_on_with_what_is_left(
    cluster: Cluster, home: Path, recipe: Path, pace: Pace
) -> None:
    """n2 disappears for good: the rank of n1 names it and ends, the job is queued again and finishes on one node.

    Who queues it again, the script that asks all nodes or SLURM that misses one, is a matter of seconds; the script says
    that one node will do. The job asked for a few variables only.
    """
    rounds = 12
    pace.slow()
    arguments = ["--recipe", str(recipe), "--train.rounds", str(rounds), "--train.checkpoint_every", "1"]
    export = ",".join(["PATH", "SLURM_CONF", "GRPO_DS_PYTHON", "GRPO_DS_SLURM_TEST", "OMP_NUM_THREADS"])
    job = cluster.submit(home, f"--export={export}", arguments=arguments)
    wait_rounds(job, 2)
    assert job.show("NumNodes") == "2"
    survivors = [p for p in job.processes() if variable(p, "SLURMD_NODENAME") == "n1" and is_rank(p)]
    started = time.monotonic()
    victims = cluster.lose_node("n2")
    assert len(survivors) == 1 and victims
    wait_for("the end of all ranks", lambda: not any(p.is_running() for p in survivors), 60)
    assert time.monotonic() - started < 60
    queued_again(job)
    done = job.rounds()
    assert done < rounds
    assert "stopped: " in job.screen and "no answer from rank 1 on n2" in job.screen, "the rank names the lost node"
    wait_for("SLURM to notice", lambda: "n2 down" in cluster.command("sinfo", "-h", "-N", "-o", "%N %T"), 120)
    pace.free()
    job.start_now()
    assert job.wait(START_S) == "COMPLETED", job.screen
    assert job.show("NumNodes") == "1"
    assert [m["round"] for m in metrics(job)] == list(range(rounds))
    assert json.loads((job.folder / "manifest.json").read_text())["ranks"] == 1


def test_a_wrong_recipe_fails_at_once_and_is_not_queued_again(cluster: Cluster, home: Path) -> None:
    job = cluster.submit(home, arguments=["--recipe", "no_such_recipe"])
    assert job.wait(START_S) == "FAILED"
    assert job.show("ExitCode") == "2:0"
    assert job.show("Restarts") == "0"
    assert "no_such_recipe" in (home / f"slurm-{job.number}.out").read_text()
