"""launch/slurm.sbatch on a real SLURM with two nodes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Launched, read_jsonl, run
from tests.slurm.cluster import Cluster, Job, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

START_S = 300.0
"""Deadline for a job to get where a test wants it; generous, because two CPUs carry both nodes."""
ENDS_S = 30.0
"""Deadline for all processes of a job to end, SLURM's own waiting included."""
EXACT = ("loss", "reward", "score_all", "kept_groups", "dropped_groups", "tokens_trained")


def metrics(job: Job | Launched) -> list[dict[str, Any]]:
    return read_jsonl(job.folder / "metrics.jsonl")


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in EXACT:
        assert other[key] == pytest.approx(one[key], abs=1e-5), key
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def wait_rounds(job: Job, count: int) -> None:
    def reached() -> bool:
        assert job.state in ("PENDING", "RUNNING", "CONFIGURING"), f"{job.state}\n{job.screen}"
        return job.rounds() >= count

    wait_for(f"round {count} of job {job.number}", reached, START_S)


def nothing_left(job: Job) -> None:
    wait_for(f"the end of all processes of job {job.number}", lambda: not job.processes(), ENDS_S)


def queued_again(job: Job) -> None:
    wait_for(f"job {job.number} queued again:\n{job.screen}", lambda: job.state == "PENDING", 120)
    assert job.show("Restarts") == "1"
    nothing_left(job)


def test_two_nodes_of_one_rank_learn_what_one_node_of_two_ranks_learns(
    cluster: Cluster, home: Path, recipe: Path, tmp_path: Path
) -> None:
    arguments = ["--recipe", str(recipe), "--train.checkpoint_every", "0"]
    job = cluster.submit(home, arguments=arguments)
    assert job.wait(START_S) == "COMPLETED", job.screen
    nothing_left(job)
    (tmp_path / "one").mkdir()
    one_node = run(arguments, tmp_path / "one", "deepspeed")
    assert one_node.process.returncode == 0, one_node.screen

    assert len(metrics(job)) == len(metrics(one_node)) == 5
    for one, other in zip(metrics(one_node), metrics(job), strict=True):
        same(one, other)
    assert json.loads((job.folder / "manifest.json").read_text())["ranks"] == 2
    nodes = {file.stem.rpartition("-")[2] for file in (job.folder / "rollouts").iterdir()}
    assert nodes == {"0", "1"}, "each node generated its share"
    logs = home / "runs" / "slurm" / job.number
    assert sorted(file.name for file in logs.iterdir()) == ["node-0.log", "node-1.log"]
    assert "round    5/5" in (logs / "node-0.log").read_text()


def test_usr1_leads_to_a_checkpoint_and_a_second_start_that_finishes(
    cluster: Cluster, home: Path, recipe: Path
) -> None:
    rounds = 30
    job = cluster.submit(
        home, arguments=["--recipe", str(recipe), "--train.rounds", str(rounds), "--train.checkpoint_every", "0"]
    )
    wait_rounds(job, 1)
    cluster.command("scancel", "--signal=USR1", "--batch", job.number)
    queued_again(job)
    done = job.rounds()
    assert 1 <= done < rounds, "it stopped between two rounds, before its end"
    (checkpoint,) = (job.folder / "checkpoints").glob("round-*")
    assert checkpoint.name == f"round-{done:06d}"
    assert "stopped: on request" in job.screen
    job.start_now()
    assert job.wait(START_S) == "COMPLETED", job.screen
    assert f"resumed from {checkpoint}" in job.screen
    assert [m["round"] for m in metrics(job)] == list(range(rounds))
    assert (job.folder / "summary.json").is_file()


def test_the_signal_before_the_time_limit_does_the_same(cluster: Cluster, home: Path, recipe: Path) -> None:
    """SLURM sends it by itself: a limit of two minutes, and the signal 100 s before."""
    job = cluster.submit(
        home,
        *("--time=2", "--signal=B:USR1@60"),
        arguments=["--recipe", str(recipe), "--train.rounds", "100000", "--train.checkpoint_every", "0"],
    )
    wait_rounds(job, 1)
    queued_again(job)
    assert list((job.folder / "checkpoints").glob("round-*"))


def test_a_cancelled_job_leaves_nothing_behind(cluster: Cluster, home: Path, recipe: Path) -> None:
    job = cluster.submit(home, arguments=["--recipe", str(recipe), "--train.rounds", "100000"])
    wait_rounds(job, 1)
    assert {p.environ().get("SLURMD_NODENAME") for p in job.processes()} == {"n1", "n2"}
    cluster.command("scancel", job.number)
    assert job.wait(ENDS_S) == "CANCELLED"
    nothing_left(job)


def test_two_jobs_on_the_same_nodes_do_not_disturb_each_other(cluster: Cluster, home: Path, recipe: Path) -> None:
    arguments = ["--recipe", str(recipe), "--train.rounds", "12", "--train.checkpoint_every", "0"]
    jobs = [cluster.submit(home, arguments=arguments) for _ in range(2)]
    wait_for("both run", lambda: [job.state for job in jobs] == ["RUNNING", "RUNNING"], START_S)
    assert [job.wait(2 * START_S) for job in jobs] == ["COMPLETED", "COMPLETED"], "\n".join(j.screen for j in jobs)
    first, second = (metrics(job) for job in jobs)
    assert len(first) == len(second) == 12
    for one, other in zip(first, second, strict=True):
        same(one, other)
    ports = {job.screen.partition("meeting at ")[2].partition(",")[0] for job in jobs}
    assert len(ports) == 2, ports


def test_a_task_of_an_array_is_queued_again_alone(cluster: Cluster, home: Path, recipe: Path) -> None:
    arguments = ["--recipe", str(recipe), "--train.rounds", "30", "--train.checkpoint_every", "0"]
    array = cluster.submit(home, "--array=0-1", arguments=arguments, nodes="1")
    tasks = [Job(cluster, f"{array.number}_{k}", home) for k in range(2)]
    for task in tasks:
        wait_rounds(task, 1)
    # The last task to start bears the number of the whole array.
    (whole,) = [task for task in tasks if task.show("JobId") == array.number]
    (other,) = [task for task in tasks if task is not whole]
    cluster.command("scancel", "--signal=USR1", "--batch", whole.number)
    queued_again(whole)
    assert other.wait(START_S) == "COMPLETED", other.screen
    assert other.show("Restarts") == "0"
    whole.start_now()
    assert whole.wait(START_S) == "COMPLETED", whole.screen
    assert [m["round"] for m in metrics(whole)] == list(range(30))


def test_a_lost_node_ends_the_job_which_goes_on_with_what_is_left(cluster: Cluster, home: Path, recipe: Path) -> None:
    """n2 disappears for good: the ranks of n1 end, the job is queued again and finishes on one node."""
    rounds = 20
    job = cluster.submit(
        home,
        arguments=["--recipe", str(recipe), "--train.rounds", str(rounds), "--train.checkpoint_every", "1"],
    )
    wait_rounds(job, 2)
    assert job.show("NumNodes") == "2"
    survivors = [p for p in job.processes() if p.environ().get("SLURMD_NODENAME") == "n1"]
    started = time.monotonic()
    victims = cluster.lose_node("n2")
    assert any("launch/train.py" in " ".join(p.cmdline()) for p in survivors) and victims
    wait_for("the end of all ranks", lambda: not any(p.is_running() for p in survivors if "train.py" in _line(p)), 60)
    assert time.monotonic() - started < 60
    queued_again(job)
    done = job.rounds()
    assert done < rounds
    wait_for("SLURM to notice", lambda: "n2 down" in cluster.command("sinfo", "-h", "-N", "-o", "%N %T"), 120)
    cluster.command("scontrol", "update", f"JobId={job.number}", "NumNodes=1", "NumTasks=1")
    job.start_now()
    assert job.wait(START_S) == "COMPLETED", job.screen
    assert "n2" in job.screen.partition("meeting at")[2].partition("meeting at")[0], "the lost node is named"
    assert job.show("NumNodes") == "1"
    assert [m["round"] for m in metrics(job)] == list(range(rounds))
    assert json.loads((job.folder / "manifest.json").read_text())["ranks"] == 1


def _line(process: Any) -> str:
    try:
        return " ".join(process.cmdline())
    except Exception:  # it has ended
        return ""


def test_each_node_has_a_server_of_its_own(cluster: Cluster, home: Path) -> None:
    """The quickstart recipe with vLLM on both nodes."""
    job = cluster.submit(home, arguments=["--recipe", "quickstart.yaml", "--train.rounds", "2"])
    assert job.wait(2 * START_S) == "COMPLETED", job.screen
    nothing_left(job)
    servers = sorted(file.parent.name for file in (job.folder / "logs").glob("*/vllm_server.log"))
    assert servers == ["node-0", "node-1"]
    assert all(m["logprob_gap"] < 1e-3 for m in metrics(job))


def test_a_wrong_recipe_fails_at_once_and_is_not_queued_again(cluster: Cluster, home: Path) -> None:
    job = cluster.submit(home, arguments=["--recipe", "no_such_recipe"])
    assert job.wait(START_S) == "FAILED"
    assert job.show("ExitCode") == "2:0"
    assert job.show("Restarts") == "0"
    assert "no_such_recipe" in (home / f"slurm-{job.number}.out").read_text()
