"""Two nodes with addresses of their own: they learn what one node learns, and one of them is lost."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from grpo_ds import peers
from tests.e2e.harness import Launched, read_jsonl
from tests.slurm.cluster import ROOT
from tests.slurm.namespaces import (
    ADDRESSES,
    PORT,
    TOGETHER_S,
    WIRE,
    deepspeed,
    environment,
    inside,
    program,
    rank,
    ssh_servers,
    together,
)
from tests.slurm.watching import metrics, same

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_deepspeed_without_ssh_learns_what_one_node_learns(
    nodes: list[str], recipe: Path, one_node: Launched, tmp_path: Path
) -> None:
    """The same line, started by hand on each node."""
    options = ["--recipe", str(recipe), "--train.rounds", "2", "--train.checkpoint_every", "0"]
    train = [str(ROOT / "launch" / "train.py"), *options]
    heads = [deepspeed(tmp_path, "--no_ssh", "--node_rank", str(k)) for k in range(2)]
    commands = [inside(node, *head, *train) for node, head in zip(nodes, heads, strict=True)]
    screens = together(commands, tmp_path, [environment()] * 2)
    found = list(tmp_path.glob("runs/*/metrics.jsonl"))
    assert len(found) == 1 and len(read_jsonl(found[0])) == 2, "\n".join(screens)
    for expected, other in zip(metrics(one_node), read_jsonl(found[0]), strict=True):
        same(expected, other)


def test_ssh_ends_when_the_other_node_falls_silent(nodes: list[str], tmp_path: Path) -> None:
    """With the options that launch/hostfile.example names; without them pdsh would wait for hours."""
    advice = re.search(r'PDSH_SSH_ARGS_APPEND="(.*)"', (ROOT / "launch" / "hostfile.example").read_text())
    assert advice is not None
    options = re.sub("Interval=[0-9]+ ", "Interval=1 ", advice[1])
    cut = f"(sleep 3; ip link set {WIRE} down) & {program('pdsh', 'pdsh')} -R ssh -w {ADDRESSES[1]} sleep 1000"
    with ssh_servers(nodes, tmp_path) as reach:
        reach = {name: f"{value} {options}" for name, value in reach.items()}
        started = time.monotonic()
        (screen,) = together([inside(nodes[0], "sh", "-c", cut)], tmp_path, [environment(**reach)], timeout_s=60)
    assert 3 < time.monotonic() - started < 40
    assert f"{ADDRESSES[1]}: ssh exited with exit code 255" in screen, screen


MEET = """
import subprocess, sys, time
started = time.monotonic()
from grpo_ds import peers
from grpo_ds.dist import DistError, Ranks
from grpo_ds.processes import leave
peers.SILENCE_S = float(sys.argv[3])
ranks = Ranks(float(sys.argv[1]))
try:
    ranks.connect("gloo")
    ranks.where = "round 7"
    ranks.barrier("all are here")
    started = time.monotonic()
    if ranks.rank == 1:
        subprocess.run(["ip", "link", "set", sys.argv[2], "down"], check=True)
    while True:
        ranks.barrier("next step")
except DistError as error:
    print(f"{type(error).__name__}: {error}")
print(f"{time.monotonic() - started:.1f}")
leave(0)
"""
"""A rank that meets the others, then waits for them again and again; the second one's node loses its network."""


def meet(
    nodes: Sequence[str],
    folder: Path,
    timeout_s: float,
    environments: Sequence[dict[str, str]],
    silence_s: float = peers.SILENCE_S,
) -> list[str]:
    commands = [inside(node, sys.executable, "-c", MEET, str(timeout_s), WIRE, str(silence_s)) for node in nodes]
    return together(commands, folder, environments)


def test_a_rank_that_stays_alone_says_who_can_tell_why(nodes: list[str], tmp_path: Path) -> None:
    """The first one knows who is missing; another one finds nobody to ask."""
    (screen,) = meet(nodes[:1], tmp_path, 3.0, [rank(0, SLURMD_NODENAME="host-0", GRPO_DS_NODES="host-0 host-1")])
    assert "DistError: no word within 3 s from rank 1 of 2 (host-1): if it is only slow, raise train.start" in screen
    (screen,) = meet(nodes[1:], tmp_path, 3.0, [rank(1, SLURMD_NODENAME="host-1")])
    assert (
        f"DistError: rank 1 on host-1 could not join the others at {ADDRESSES[0]}:{PORT} within 3 s; if it is" in screen
    )


def test_ranks_of_two_jobs_that_meet_by_mistake_say_so(nodes: list[str], tmp_path: Path) -> None:
    screens = meet(nodes, tmp_path, 60.0, [rank(k, GRPO_DS_JOB=f"job-{k}") for k in range(2)])
    for screen in screens:
        assert "DistError: ranks of different jobs (job-0, job-1) met: give each job a MASTER_PORT" in screen


def test_a_node_that_falls_silent_is_named_within_the_deadline(nodes: list[str], tmp_path: Path) -> None:
    """No connection is reset, as after a power cut: both sides wait until the deadline, then say who does not answer."""
    timeout_s = 8.0
    screens = meet(nodes, tmp_path, timeout_s, [rank(k, SLURMD_NODENAME=f"host-{k}") for k in range(2)])
    for number, screen in enumerate(screens):
        said, waited = screen.splitlines()[-2:]
        other = 1 - number
        assert said.startswith(
            f"PeerError: rank {number}: barrier (next step) failed at round 7: a peer died or missed"
        ), screen
        assert f"no answer from rank {other} on host-{other}" in said, screen
        assert float(waited) < timeout_s + peers.PATIENCE_S + 5.0


def test_a_node_that_falls_silent_is_named_long_before_the_deadline(nodes: list[str], tmp_path: Path) -> None:
    """The deadline of a collective is an hour in a recipe; the kernels' probes are the ones that notice."""
    environments = [rank(k, SLURMD_NODENAME=f"host-{k}") for k in range(2)]
    screens = meet(nodes, tmp_path, 10 * TOGETHER_S, environments, silence_s=8.0)
    for number, screen in enumerate(screens):
        other = 1 - number
        assert (
            f"grpo_ds: stopped: PeerError: rank {number}: a node said nothing for 8 s, at round 7; "
            f"no answer from rank {other} on host-{other}" in screen
        ), screen
