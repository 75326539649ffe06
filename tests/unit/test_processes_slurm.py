"""A rank that srun started knows its place, or says what is wrong with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from grpo_ds.config import RecipeError
from grpo_ds.processes import adopt_slurm

# Rank 5 of 8, as SLURM 22.05 describes it: two nodes of four tasks.
STEP = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "20008",
}


def test_a_task_of_a_step_becomes_a_rank() -> None:
    environ = dict(STEP)
    adopt_slurm(environ)
    added = {key: value for key, value in environ.items() if key not in STEP}
    assert added == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize("environ", [{}, STEP | {"RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}])
def test_other_launchers_and_batch_scripts_are_left_alone(environ: dict[str, str]) -> None:
    """The last one is a script of sbatch: it has a task number too, but is no step."""
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_a_single_task_needs_no_meeting_point() -> None:
    environ = STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    environ["SLURM_STEP_TASKS_PER_NODE"] = "1"
    del environ["MASTER_ADDR"], environ["MASTER_PORT"]
    adopt_slurm(environ)
    assert environ["WORLD_SIZE"] == environ["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "5,3"},
            r"different numbers of tasks \(5,3\): ask for --nodes and --ntasks-per-",
        ),
        ({"SLURM_NODEID": "0"}, "start them with srun --distribution=block"),
        ({"MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT are not set"),
    ],
)
def test_a_step_that_cannot_work_is_refused(change: dict[str, str | None], message: str) -> None:
    environ = {key: value for key, value in (STEP | change).items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        adopt_slurm(environ)


def test_a_stop_request_is_seen_and_kills_neither_the_rank_nor_its_children() -> None:
    program = (
        "import os, signal, subprocess, sys\n"
        "from grpo_ds.processes import STOP_SIGNAL, hold_stop_request, stop_requested\n"
        "hold_stop_request()\n"
        "assert not stop_requested()\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "os.kill(os.getpid(), STOP_SIGNAL); child.send_signal(STOP_SIGNAL)\n"
        "assert stop_requested() and stop_requested()\n"
        "child.communicate(b'\\n', timeout=60)\n"
        "sys.exit(child.returncode)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    without = program.replace("hold_stop_request()\nassert", "assert", 1)
    died = subprocess.run([sys.executable, "-c", without], env=os.environ, capture_output=True, timeout=120)
    assert died.returncode == -signal.SIGUSR1, "what the test above would see without the precaution"
