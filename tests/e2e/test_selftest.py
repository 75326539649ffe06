"""`grpo-ds selftest`: passes where nothing moves, and says what moved where something does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--recipe", "quickstart.yaml", "--engine.kind", "hf", "--train.prompts_per_round", "4", "--rollout.n", "2"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def failed(output: str) -> list[str]:
    return [line.split("  ")[0] for line in output.splitlines() if line.endswith("FAILED")]


def test_nothing_moves_at_learning_rate_zero() -> None:
    done = run(["-m", "grpo_ds.cli", "selftest", *OPTIONS])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "selftest: nothing moved" in done.stdout and failed(done.stdout) == []


def test_a_gap_above_the_limit_fails_its_lines_only() -> None:
    done = run(["-m", "grpo_ds.cli", "selftest", *OPTIONS, "--sync.max_logprob_gap", "1e-12"])
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert failed(done.stdout) == [f"round {k}: mean |trainer - engine| log-probability" for k in (0, 1)]


def test_weights_that_move_are_seen_on_both_sides() -> None:
    code = (
        "import sys, grpo_ds.selftest as s; "
        "s.STILL = tuple('1e-3' if word == '0' else word for word in s.STILL); "
        "sys.exit(s.selftest(sys.argv[1:]))"
    )
    done = run(["-c", code, *OPTIONS, "--actor.lr_warmup_steps", "0"])
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert failed(done.stdout)[0] == "trainer tensors whose bytes changed"
    assert "the same: max |Δ log-probability|" in failed(done.stdout)


def test_a_wrong_option_is_refused() -> None:
    done = run(["-m", "grpo_ds.cli", "selftest", *OPTIONS, "--actor.lrr", "1"])
    assert done.returncode == 2 and "actor.lr" in done.stderr
