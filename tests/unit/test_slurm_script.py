"""launch/slurm.sbatch and slurm_engines.sbatch against commands that play SLURM's; tests/slurm has the real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SRUN = """#!/bin/bash
echo "$*" >>"$FAKE/srun.log"
case " $* " in
    *" --overlap "*) case " $GONE " in *" $(grep -o 'nodelist=[^ ]*' <<<"$*" | cut -d= -f2) "*) exit 1 ;; esac ;;
    *engine_node*) echo "http://n3:1" >"$PWD/runs/slurm/$SLURM_JOB_ID/engine-0.url"; exec sleep 60 ;;
    *) eval "$STEP" ;;
esac
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") tr , '\\n' <<<"$3" ;;
    "show node") case " $DOWN " in *" $3 "*) echo "State=DOWN*+NOT_RESPONDING" ;; *) echo "State=IDLE" ;; esac ;;
    update*) shift; echo "$*" >>"$FAKE/update.log" ;;
    "show job") echo "JobId=$3 JobState=${STATE:-RUNNING} EndTime=${END:-Unknown}"; echo "PreemptTime=${PREEMPTED:-None}" ;;
    requeue*) echo "$2" >>"$FAKE/requeue.log"; kill -TERM $PPID ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "grpo",
    "SLURM_JOB_NODELIST": "n1,n2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_GPUS_ON_NODE": "8",
    "MASTER_ADDR": "n1",
    "GRPO_DS_PYTHON": sys.executable,
}
HET = {
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "n3",
    "SLURM_NTASKS_PER_NODE_HET_GROUP_0": "8",
}


class Slurm:
    """A folder to submit from, and the commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "launch").symlink_to(ROOT / "launch")
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        self.logs = folder / "runs" / "slurm" / "7"

    def start(self, *, script: str = "slurm.sbatch", step: str = "true", **job: str) -> subprocess.Popen[str]:
        own = {
            "FAKE": str(self.folder),
            "STEP": step,
            "GONE": "",
            "DOWN": "",
            "PATH": f"{self.folder}:{os.environ['PATH']}",
        }
        command = ["bash", str(ROOT / "launch" / script), "--recipe", "r.yaml"]
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | JOB | own | job
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def run(self, **job: str) -> tuple[int, str]:
        """(exit code, screen)."""
        process = self.start(**job)
        screen, _ = process.communicate(timeout=60)
        return process.returncode, screen

    def steps(self) -> list[str]:
        """The arguments of each srun."""
        return (self.folder / "srun.log").read_text().splitlines()

    def queued_again(self) -> int:
        log = self.folder / "requeue.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def updates(self) -> list[str]:
        """What the queued job was changed to."""
        log = self.folder / "update.log"
        return log.read_text().splitlines() if log.exists() else []

    def log(self, text: str) -> str:
        """A step that says this in the first node's log, then fails."""
        return f"echo '{text}' >>{self.logs}/node-0.log; exit 1"


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_a_task_may_use_the_whole_node_and_has_the_scripts_environment(slurm: Slurm) -> None:
    """Bound to a CPU of its own, a rank would hold its engine and its reward processes there too."""
    code, screen = slurm.run()
    assert code == 0 and "finished" in screen
    (step,) = slurm.steps()
    words = step.split()
    assert {"--cpu-bind=none", "--gpu-bind=none", "--export=ALL"} <= set(words)
    assert {"--nodes=2", "--ntasks-per-node=8", "--ntasks=16", f"{sys.executable}"} <= set(words)
    assert not any(word.startswith("--cpus-per-task") for word in words), "which would leave the other CPUs unused"


def test_so_may_an_engine_node(slurm: Slurm) -> None:
    code, screen = slurm.run(script="slurm_engines.sbatch", **HET)
    assert code == 0, screen
    engine, step = slurm.steps()
    for words, group in ((engine.split(), "1"), (step.split(), "0")):
        assert {"--cpu-bind=none", "--gpu-bind=none", "--export=ALL", f"--het-group={group}"} <= set(words)
    assert '--engine.urls ["http://n3:1"]' in step


@pytest.mark.parametrize(
    ("script", "job", "sentence"),
    [
        ("slurm.sbatch", {"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-task hides a node's other GPUs from a task"),
        ("slurm_engines.sbatch", HET | {"SLURM_GPUS_PER_TASK_HET_GROUP_0": "1"}, "--gpus-per-task hides a node's"),
        ("slurm_engines.sbatch", HET | {"SLURM_GPUS_PER_TASK_HET_GROUP_1": "1"}, "a server takes all GPUs of its node"),
        ("slurm.sbatch", {"SLURM_GPUS_ON_NODE": "4"}, "--ntasks-per-node is 8 and a node has 4 GPUs"),
        ("slurm.sbatch", {"GRPO_DS_PYTHON": "/bin/false"}, "no environment at /bin/false"),
    ],
)
def test_a_job_that_cannot_work_is_refused(slurm: Slurm, script: str, job: dict[str, str], sentence: str) -> None:
    code, screen = slurm.run(script=script, **job)
    assert code == 2 and sentence in screen
    assert not (slurm.folder / "srun.log").exists()


def test_a_python_without_the_environment_is_refused(slurm: Slurm) -> None:
    """PYTHON names the interpreter that set-up builds on, and says nothing here."""
    bare = slurm.folder / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    code, screen = slurm.run(GRPO_DS_PYTHON=str(bare))
    assert code == 2 and "give GRPO_DS_PYTHON the python of one that has torch and deepspeed" in screen
    assert slurm.run(PYTHON=str(bare))[0] == 0


def test_a_loss_puts_the_job_back_until_no_checkpoint_comes_of_it(slurm: Slurm) -> None:
    run = slurm.folder / "runs" / "grpo-7-1"
    (run / "checkpoints" / "round-000002").mkdir(parents=True)
    step = slurm.log(f" 0: run folder {run}")
    for times in (1, 2, 3):
        code, screen = slurm.run(step=step, GONE="n2")
        assert "queued again: lost n2" in screen and slurm.queued_again() == times, screen
    code, screen = slurm.run(step=step, GONE="n2")
    assert code == 1 and "not queued again: 3 starts brought no checkpoint after round-000002" in screen
    (run / "checkpoints" / "round-000003").mkdir()
    slurm.run(step=step, GONE="n2")
    assert slurm.queued_again() == 4, "it went on in the meantime"
    for _ in range(2):
        slurm.run(step="exit 1", GONE="n2")
    code, screen = slurm.run(step="exit 1", GONE="n2")
    assert code == 1 and slurm.queued_again() == 6, "starts that get nowhere count too"


def test_after_a_loss_the_job_may_start_again_on_what_is_left(slurm: Slurm) -> None:
    slurm.run(step="exit 1", GONE="n2", SLURM_JOB_NODELIST="n1,n2,n3")
    assert slurm.updates() == ["JobId=7 NumNodes=2-3 NumTasks=16"], "two nodes of eight ranks, or three again"
    slurm.run(step="exit 1", GONE="n3", SLURM_JOB_NODELIST="n1,n3")
    assert slurm.updates()[1:] == ["JobId=7 NumNodes=1-3 NumTasks=8"]
    slurm.run(step="exit 1", GONE="n3", SLURM_JOB_NODELIST="n1,n3", GRPO_DS_MIN_NODES="2")
    slurm.run(step="exit 75")
    assert len(slurm.updates()) == 2 and slurm.queued_again() == 4


def test_so_it_may_where_slurm_noticed_the_loss_first(slurm: Slurm) -> None:
    process = slurm.start(step="touch $FAKE/runs/begun; sleep 5 >/dev/null 2>&1", DOWN="n2")
    wait_for_step(slurm)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert process.stdout is not None
    process.stdout.close()
    assert slurm.updates() == ["JobId=7 NumNodes=1-2 NumTasks=8"] and slurm.queued_again() == 0


def wait_for_step(slurm: Slurm) -> None:
    deadline = time.monotonic() + 30
    while not (slurm.folder / "runs" / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_nothing_can_be_asked_nothing_is_lost(slurm: Slurm) -> None:
    code, screen = slurm.run(step="exit 3", GONE="n1 n2")
    assert code == 3 and "srun starts nothing any more, not even on n1" in screen
    assert slurm.queued_again() == 0


def test_the_cause_is_that_of_this_start(slurm: Slurm) -> None:
    slurm.logs.mkdir(parents=True)
    (slurm.logs / "node-0.log").write_text("0: grpo_ds: stopped: of the start before\n")
    code, screen = slurm.run(step="exit 1")
    assert code == 1 and "of the start before" not in screen
    _, screen = slurm.run(step=slurm.log("0: grpo_ds: stopped: of this one"))
    assert "n1: 0: grpo_ds: stopped: of this one" in screen


def test_a_round_that_outlasts_the_limit_begins_again_from_the_last_checkpoint(slurm: Slurm) -> None:
    """20 seconds before its limit the job is queued again instead of ending there as one that failed."""
    end = (datetime.now() + timedelta(seconds=22)).isoformat(timespec="seconds")
    step = "trap '' USR1; touch $FAKE/runs/begun; sleep 8 >/dev/null 2>&1"
    process = slurm.start(step=step, END=end)
    wait_for_step(slurm)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert "asked to stop" in lines[1]
    assert "queued again: no checkpoint came within 20 s of the time limit" in lines[2]
    assert process.wait(timeout=30) == 143, "as SLURM ends the script of a job that is queued again"
    process.stdout.close()
    assert slurm.queued_again() == 1


def test_a_stop_on_request_and_a_preemption_put_the_job_back_and_an_end_from_outside_does_not(slurm: Slurm) -> None:
    assert "queued again: stopped on request" in slurm.run(step="exit 75")[1]
    assert "queued again: preempted" in slurm.run(step="exit 143", PREEMPTED="2030-01-01T00:00:00")[1]
    code, screen = slurm.run(step="exit 75", STATE="CANCELLED")
    assert code == 75 and "the job is CANCELLED and is not queued again" in screen
    assert slurm.run(step="exit 2", GONE="n2")[0] == 2
    assert slurm.queued_again() == 2
