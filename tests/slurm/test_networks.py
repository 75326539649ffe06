"""Two nodes with addresses of their own: two network namespaces on a wire, through torchrun and deepspeed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import read_jsonl, run
from tests.slurm.cluster import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
PORT = "29400"
"""Free by construction: the namespaces are new."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr} (network namespaces need root)"


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two namespaces; their ends of the wire are wire0 and wire1 with 10.77.0.1 and 10.77.0.2."""
    names = [f"grpo{os.getpid()}a", f"grpo{os.getpid()}b"]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", "wire0", "type", "veth", "peer", "name", "wire1", "netns", names[1])
        for k, name in enumerate(names):
            _ip("-n", name, "address", "add", f"10.77.0.{k + 1}/24", "dev", f"wire{k}")
            _ip("-n", name, "link", "set", f"wire{k}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30, check=False)


def on_each(nodes: list[str], commands: list[list[str]], cwd: Path, **environ: str) -> list[str]:
    """Runs one command a node at the same time; returns what each printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | environ
    started = []
    for k, (name, command) in enumerate(zip(nodes, commands, strict=True)):
        # This machine's name means a loopback address in both namespaces, so the interface is named.
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                cwd=cwd,
                env={"GLOO_SOCKET_IFNAME": f"wire{k}"} | env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        return [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()  # the ranks end with their launcher
                process.wait()


def launcher(kind: str, rank: int, folder: Path) -> list[str]:
    """The launcher's own words on node `rank`."""
    if kind == "torchrun":
        words = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
        return [*words, "--master-addr", "10.77.0.1", "--master-port", PORT]
    hosts = folder / "hostfile"
    hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    words = [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank)]
    return [*words, "--master_addr", "10.77.0.1", "--master_port", PORT]


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_two_nodes_learn_what_one_node_learns(kind: str, nodes: list[str], recipe: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", str(recipe), "--train.rounds", "2", "--train.checkpoint_every", "0"]
    train = [str(ROOT / "launch" / "train.py"), *arguments]
    screens = on_each(nodes, [[*launcher(kind, k, tmp_path), *train] for k in range(2)], tmp_path)
    found = list(tmp_path.glob("runs/*/metrics.jsonl"))
    assert len(found) == 1 and len(read_jsonl(found[0])) == 2, "\n".join(screens)
    (tmp_path / "one").mkdir()
    one = run(arguments, tmp_path / "one", "deepspeed")
    for expected, other in zip(read_jsonl(one.folder / "metrics.jsonl"), read_jsonl(found[0]), strict=True):
        for key in ("loss", "reward", "score_all", "tokens_trained"):
            assert other[key] == pytest.approx(expected[key], abs=1e-5), key
    assert (found[0].parent / "rollouts" / "round-000000-node-1.jsonl").is_file()


def test_the_doctor_examines_both_nodes(nodes: list[str], tmp_path: Path) -> None:
    commands = [[*launcher("torchrun", k, tmp_path), "-m", "grpo_ds.doctor", "--run-dir", "runs"] for k in range(2)]
    screens = on_each(nodes, commands, tmp_path)
    assert "doctor: all is well" in screens[0], "\n".join(screens)


def test_the_doctor_says_which_interface_to_name(nodes: list[str], tmp_path: Path) -> None:
    commands = [[*launcher("torchrun", k, tmp_path), "-m", "grpo_ds.doctor", "--run-dir", "runs"] for k in range(2)]
    screens = on_each(nodes, commands, tmp_path, GLOO_SOCKET_IFNAME="")
    assert "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to one of wire0" in screens[0], screens[0]


def test_ranks_of_two_jobs_that_meet_by_mistake_say_so(nodes: list[str], recipe: Path, tmp_path: Path) -> None:
    train = [str(ROOT / "launch" / "train.py"), "--recipe", str(recipe)]
    commands = [["env", f"GRPO_DS_JOB=job-{k}", *launcher("torchrun", k, tmp_path), *train] for k in range(2)]
    screens = on_each(nodes, commands, tmp_path)
    assert "ranks of different jobs (job-0, job-1) met at MASTER_PORT" in "".join(screens)
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))
