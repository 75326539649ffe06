"""The engine's log-probabilities follow the trainer's through real ZeRO-3 ranks and a real vLLM server."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module", params=["auto", "group"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("sync")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    options = ["--recipe", "quickstart.yaml", "--run.dir", str(folder), "--train.prompts_per_round", "8"]
    # Every group is trained on and none is carried, so all samples of a round are fresh. Buckets of 1 MiB: several.
    options += ["--algorithm.filter_groups.enable", "false", "--sync.bucket_mb", "1", "--actor.lr", "1e-3"]
    options += ["--sync.transport", request.param]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "sync" / "trained_policy.py"), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    way = {"auto": "shared_memory: the engine is on this node", "group": "group: sync.transport says so"}[request.param]
    assert f"weights reach the engine by {way}" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(lines[0].removeprefix("REPORT ")))


def test_both_sides_agree_before_the_first_step(report: dict[str, list]) -> None:
    worst, versions = report["start"]
    assert worst < 1e-4 and versions == [0]


def test_three_steps_without_publishing_leave_the_engine_behind(report: dict[str, list]) -> None:
    worst, versions = report["three steps later, not published"]
    assert worst > 1e-2 and versions == [0]


def test_after_publishing_they_agree_again_and_tokens_carry_the_new_version(report: dict[str, list]) -> None:
    worst, versions = report["published"]
    assert worst < 1e-4 and versions == [1]
