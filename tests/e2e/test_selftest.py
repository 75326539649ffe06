"""`grpo-ds selftest`: passes where nothing moves, and says what moved, or why both sides disagree, where not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.harness import BIN, free_port

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--recipe", "quickstart.yaml", "--engine.kind", "hf", "--train.prompts_per_round", "4", "--rollout.n", "2"]
CLI = [sys.executable, "-m", "grpo_ds.cli", "selftest"]


def run(
    command: list[str], timeout_s: float = 240, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env | (more or {}), capture_output=True, text=True, timeout=timeout_s)


def failed(output: str) -> list[str]:
    return [line.split("  ")[0] for line in output.splitlines() if line.endswith("FAILED")]


def test_nothing_moves_at_learning_rate_zero_and_nothing_is_left(tmp_path: Path) -> None:
    done = run([*CLI, *OPTIONS, "--run.dir", str(tmp_path / "runs" / "here")])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "selftest: nothing moved" in done.stdout and failed(done.stdout) == []
    assert str(tmp_path / "runs" / "here" / ".selftest-") in done.stdout, "its folder is where a run's would be"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_but_what_was_there(tmp_path: Path) -> None:
    code = (
        "import sys, grpo_ds.selftest as s; from grpo_ds.sync.publish import WeightPublisher as W; "
        "W.publish = lambda self, version: 1 / 0; "
        "s.leave(s.selftest(sys.argv[1:]))"
    )
    (tmp_path / "run-of-somebody").mkdir()
    done = run([sys.executable, "-c", code, *OPTIONS, "--run.dir", str(tmp_path)])
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr, done.stdout + done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["run-of-somebody"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_and_a_real_server_pass_as_well() -> None:
    """The command of the README, on the recipe of the quick start."""
    head = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = run([*head, "--module", "grpo_ds.selftest", "--recipe", "quickstart.yaml"], timeout_s=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("selftest: nothing moved") == 1 and failed(done.stdout) == []
    assert all(f"version {k}: max |trainer - engine| log-probability" in done.stdout for k in (0, 1, 2))
    print(done.stdout[done.stdout.rindex("found") :])


def test_a_gap_above_the_limit_fails_its_lines_only_and_is_diagnosed() -> None:
    done = run([*CLI, *OPTIONS, "--sync.parity_max", "1e-12"])
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    probes = ("version 0", "version 1", "version 2", "changed weights", "restored weights")
    assert failed(done.stdout) == [f"{probe}: max |trainer - engine| log-probability" for probe in probes]
    assert "parity at policy version 4: " in done.stdout and "ruled out: temperature" in done.stdout


def test_publications_that_load_nothing_are_seen() -> None:
    """Every tensor is announced, counted and versioned as it should be, and the engine keeps the weights of the disk."""
    code = (
        "import sys, grpo_ds.selftest as s; from grpo_ds.engine.hf import HfEngine; "
        "HfEngine.update_bucket = lambda self, b, carrier=None: self._ledger.arrived(t['name'] for t in b['tensors']); "
        "s.leave(s.selftest(sys.argv[1:]))"
    )
    done = run([sys.executable, "-c", code, *OPTIONS])
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    seen = "changed weights: {} |trainer - engine| log-probability"
    wanted = ["changed weights: mean gap, published / not published", *(seen.format(n) for n in ("max", "p99", "mean"))]
    assert failed(done.stdout) == wanted


def test_weights_that_move_are_seen_on_both_sides() -> None:
    code = (
        "import sys, grpo_ds.selftest as s; "
        "s.STILL = tuple('1e-3' if word == '0' else word for word in s.STILL); "
        "s.leave(s.selftest(sys.argv[1:]))"
    )
    done = run([sys.executable, "-c", code, *OPTIONS, "--actor.lr_warmup_steps", "0"])
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert failed(done.stdout)[0] == "trainer tensors whose bytes changed"
    assert "the same: max |Δ log-probability|" in failed(done.stdout)


def test_a_wrong_option_is_refused() -> None:
    done = run([*CLI, *OPTIONS, "--actor.lrr", "1"])
    assert done.returncode == 2 and "actor.lr" in done.stderr


def test_a_launcher_that_ends_rank_0_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*CLI, *OPTIONS, "--run.dir", str(tmp_path / "runs")], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as running:
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("runs/.selftest-*/*/logs")) and time.monotonic() < deadline:
                time.sleep(0.1)
            running.terminate()
            assert running.wait(60) == 143
        finally:
            running.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head", [CLI, [sys.executable, "-m", "grpo_ds.selftest"]], ids=["command", "module"])
def test_ranks_that_srun_started_are_understood(head: list[str]) -> None:
    """As launch/train.py understands them: these nodes have different numbers of ranks, which is refused."""
    step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    done = run([*head, *OPTIONS], more=step | {"SLURM_STEP_TASKS_PER_NODE": "2,1"})
    assert done.returncode == 2 and "SLURM gave the nodes different numbers of tasks (2,1)" in done.stderr
