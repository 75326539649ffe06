"""Two nodes with addresses of their own, through torchrun and deepspeed: they learn what one node learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Launched, read_jsonl
from tests.slurm.cluster import ROOT
from tests.slurm.namespaces import (
    ADDRESSES,
    BIN,
    PORT,
    environment,
    hostfile,
    inside,
    program,
    ssh_servers,
    together,
    two_namespaces,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

MASTER = ["--master-addr", ADDRESSES[0], "--master-port", PORT]


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    with two_namespaces() as names:
        yield names


def torchrun(rank: int) -> list[str]:
    return [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), *MASTER]


def deepspeed(folder: Path, *how: str) -> list[str]:
    words = [word.replace("-addr", "_addr").replace("-port", "_port") for word in MASTER]
    return [str(BIN / "deepspeed"), "--hostfile", hostfile(folder), *how, *words]


def learned_the_same(folder: Path, one_node: Launched, screens: list[str]) -> None:
    found = list(folder.glob("runs/*/metrics.jsonl"))
    assert len(found) == 1 and len(read_jsonl(found[0])) == 2, "\n".join(screens)
    for expected, other in zip(read_jsonl(one_node.folder / "metrics.jsonl"), read_jsonl(found[0]), strict=True):
        for key in ("loss", "reward", "score_all", "tokens_trained"):
            assert other[key] == pytest.approx(expected[key], abs=1e-5), key
    assert (found[0].parent / "rollouts" / "round-000000-node-1.jsonl").is_file()


def train(recipe: Path) -> list[str]:
    options = ["--train.rounds", "2", "--train.checkpoint_every", "0"]
    return [str(ROOT / "launch" / "train.py"), "--recipe", str(recipe), *options]


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_two_nodes_learn_what_one_node_learns(
    kind: str, nodes: list[str], recipe: Path, one_node: Launched, tmp_path: Path
) -> None:
    """Started by hand on each node."""
    heads = {
        "torchrun": [torchrun(k) for k in range(2)],
        "deepspeed": [deepspeed(tmp_path, "--no_ssh", "--node_rank", str(k)) for k in range(2)],
    }
    commands = [inside(node, *head, *train(recipe)) for node, head in zip(nodes, heads[kind], strict=True)]
    screens = together(commands, tmp_path, [environment()] * 2)
    learned_the_same(tmp_path, one_node, screens)


def test_deepspeed_reaches_the_other_node_by_ssh(
    nodes: list[str], recipe: Path, one_node: Launched, tmp_path: Path
) -> None:
    """One command on the first node; pdsh starts the ranks of both, with the variables of .deepspeed_env."""
    program("pdsh", "pdsh")
    exports = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "GLOO_SOCKET_IFNAME")
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={environment()[name]}\n" for name in exports))
    with ssh_servers(nodes, tmp_path) as reach:
        # deepspeed's own check would ask the ssh configuration of whoever runs this test.
        command = inside(nodes[0], *deepspeed(tmp_path, "--no_ssh_check"), *train(recipe))
        (screen,) = together([command], tmp_path, [environment(**reach)])
        logs = [log.read_text() for log in sorted(tmp_path.glob("sshd-*.log"))]
    learned_the_same(tmp_path, one_node, [screen, *logs])
    assert all("Pubkey auth succeeded" in log for log in logs), logs


def test_ranks_of_two_jobs_that_meet_by_mistake_say_so(nodes: list[str], recipe: Path, tmp_path: Path) -> None:
    commands = [inside(node, *torchrun(k), *train(recipe)) for k, node in enumerate(nodes)]
    screens = together(commands, tmp_path, [environment(GRPO_DS_JOB=f"job-{k}") for k in range(2)])
    assert "ranks of different jobs (job-0, job-1) met at MASTER_PORT" in "".join(screens)
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))
