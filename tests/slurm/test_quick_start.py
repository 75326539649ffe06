"""The quick start with two ranks, on two nodes with a vLLM engine each, learns what it learns on one node with one engine.

Through SLURM, and on nodes with addresses of their own through torchrun and through deepspeed's hostfile.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Launched, read_jsonl, run
from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.namespaces import deepspeed, environment, inside, program, ssh_servers, together, torchrun
from tests.slurm.watching import START_S, metrics, nothing_left, same, wait_rounds

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

RECIPE = ["--recipe", "quickstart.yaml", "--train.checkpoint_every", "0", "--actor.lr_warmup_steps", "2"]
TRAIN = [str(ROOT / "launch" / "train.py"), *RECIPE, "--train.rounds", "10"]


@pytest.fixture(scope="module")
def one_round(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """One node, two ranks, one engine."""
    arguments = [*RECIPE, "--train.rounds", "1", "--data.heldout", "null"]
    done = run(arguments, tmp_path_factory.mktemp("one"), "deepspeed")
    assert done.process.returncode == 0, done.screen
    return done


def mean(rounds: Sequence[dict[str, Any]], key: str) -> float:
    return sum(m[key] for m in rounds) / len(rounds)


def learned(folder: Path, one_round: Launched) -> None:
    """The first step is that of one node, the reward rises, and each node had an engine."""
    rounds = read_jsonl(folder / "metrics.jsonl")
    assert len(rounds) == 10
    same(metrics(one_round)[0], rounds[0])
    assert mean(rounds[-5:], "score_all") > mean(rounds[:5], "score_all") + 0.1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout_after"] > summary["heldout_before"] + 0.1
    assert all(m["logprob_gap"] < 1e-3 for m in rounds)
    assert json.loads((folder / "manifest.json").read_text())["ranks"] == 2
    servers = sorted(file.parent.name for file in (folder / "logs").glob("*/vllm_server.log"))
    assert servers == ["node-0", "node-1"]
    nodes = {file.stem.rpartition("-")[2] for file in (folder / "rollouts").iterdir()}
    assert nodes == {"0", "1"}, "each node generated its share"


def run_folder(home: Path, screens: Sequence[str]) -> Path:
    found = list(home.glob("runs/*/summary.json"))
    assert len(found) == 1, "\n".join(screens)
    return found[0].parent


def test_through_slurm(cluster: Cluster, home: Path, one_round: Launched) -> None:
    job = cluster.submit(home, arguments=[*RECIPE, "--train.rounds", "10"])
    assert job.wait(2 * START_S) == "COMPLETED", job.screen
    nothing_left(job)
    learned(job.folder, one_round)
    logs = home / "runs" / "slurm" / job.number
    assert sorted(file.name for file in logs.glob("*.log")) == ["node-0.log", "node-1.log"]
    assert "round   10/10" in (logs / "node-0.log").read_text()


@pytest.mark.slow
def test_through_slurm_beside_another_one(cluster: Cluster, home: Path, one_round: Launched) -> None:
    """Two jobs at once on the same two nodes, with four vLLM servers in all: each trains as if it were alone."""
    jobs = [cluster.submit(home, arguments=[*RECIPE, "--train.rounds", "6"]) for _ in range(2)]
    for job in jobs:
        wait_rounds(job, 1)
    assert [job.state for job in jobs] == ["RUNNING", "RUNNING"]
    servers = [job.folder / "logs" / node / "vllm_server.log" for job in jobs for node in ("node-0", "node-1")]
    assert all(server.is_file() for server in servers)
    for job in jobs:
        assert job.wait(2 * START_S) == "COMPLETED", job.screen
        nothing_left(job)
    one, two = (metrics(job) for job in jobs)
    assert len(one) == len(two) == 6
    same(metrics(one_round)[0], one[0])
    same(one[0], two[0])
    for rounds in (one, two):
        assert all(m["logprob_gap"] < 1e-3 for m in rounds)
        assert [m["version"] - rounds[0]["version"] for m in rounds] == list(range(6))


def test_through_torchrun(nodes: list[str], tmp_path: Path, one_round: Launched) -> None:
    commands = [inside(node, *torchrun(k), *TRAIN) for k, node in enumerate(nodes)]
    screens = together(commands, tmp_path, [environment()] * 2, timeout_s=2 * START_S)
    learned(run_folder(tmp_path, screens), one_round)


def test_through_deepspeeds_hostfile(nodes: list[str], tmp_path: Path, one_round: Launched) -> None:
    """One command on the first node; pdsh starts the ranks of both by ssh, with the variables of .deepspeed_env."""
    program("pdsh", "pdsh")
    exports = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "GLOO_SOCKET_IFNAME")
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={environment()[name]}\n" for name in exports))
    with ssh_servers(nodes, tmp_path) as reach:
        # deepspeed's own check would ask the ssh configuration of whoever runs this test.
        command = inside(nodes[0], *deepspeed(tmp_path, "--no_ssh_check"), *TRAIN)
        (screen,) = together([command], tmp_path, [environment(**reach)], timeout_s=2 * START_S)
        logs = [log.read_text() for log in sorted(tmp_path.glob("sshd-*.log"))]
    learned(run_folder(tmp_path, [screen, *logs]), one_round)
    assert all("Pubkey auth succeeded" in log for log in logs), logs
