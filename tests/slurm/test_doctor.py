"""`grpo-ds doctor` on two nodes with addresses of their own: sound ones, and with faults that are really there.

Real here: other versions, a folder that is not shared, a small /dev/shm, a slow wire, an engine that does not start, an
address that leads nowhere, a port in use, a variable that is missing. A machine has one clock, so the second node's is
played: its Python says another time.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import free_port
from tests.slurm.cluster import Cluster
from tests.slurm.namespaces import PORT, TOGETHER_S, WIRE, environment, inside, ip, program, rank, together

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

DOCTOR = [sys.executable, "-m", "grpo_ds.doctor", "--run-dir", "runs"]
AHEAD = "import time\nnow = time.time\ntime.time = lambda: now() + 60.0\n"


def first_problem(screen: str) -> str:
    return next((line for line in screen.splitlines() if line.startswith("doctor: ")), screen)


def test_sound_nodes_are_examined(nodes: list[str], tmp_path: Path) -> None:
    screens = together([inside(node, *DOCTOR) for node in nodes], tmp_path, [rank(0), rank(1)])
    assert first_problem(screens[0]) == "doctor: all is well", "\n".join(screens)


def test_slurms_own_launcher_is_understood(cluster: Cluster, home: Path) -> None:
    cluster.env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    screen = cluster.command("srun", "--nodes=2", "--ntasks-per-node=1", *DOCTOR, cwd=home, timeout_s=TOGETHER_S)
    assert "[n1]\n" in screen and "rank 0 of 2" in screen
    assert first_problem(screen) == "doctor: all is well", screen


def test_the_second_nodes_faults_are_all_named(nodes: list[str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "shim" / "deepspeed-0.0.1.dist-info").mkdir(parents=True)
    (tmp_path / "shim" / "deepspeed-0.0.1.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.0.1\n")
    (tmp_path / "shim" / "sitecustomize.py").write_text(AHEAD)
    (tmp_path / "runs").mkdir()
    slow = [program("tc", "iproute2"), "qdisc", "add", "dev", WIRE, "root", "tbf"]
    ip("netns", "exec", nodes[1], *slow, "rate", "300mbit", "burst", "256kb", "latency", "50ms")

    model = recipe.parent / "model"
    mounts = f"mount -t tmpfs none runs && mount -t tmpfs -o size=64m none /dev/shm && mount -t tmpfs none {model}"
    doctor = [*DOCTOR, "--recipe", str(recipe)]
    commands = [inside(nodes[0], *doctor), inside(nodes[1], *doctor, setup=mounts)]
    path = environment()["PYTHONPATH"]
    faulty = rank(1, PYTHONPATH=f"{tmp_path / 'shim'}:{path}", SLURMD_NODENAME="second")
    screens = together(commands, tmp_path, [rank(0, SLURMD_NODENAME="first"), faulty])

    said = [line for line in screens[0].splitlines() if line.startswith("doctor: ")]
    expected = [
        "versions: deepspeed is 0.0.1 on second and ",
        "clocks: second is 60.",
        "shared folder: second does not see a file that first wrote there",
        "/dev/shm: second has 0.06 GiB free, 1 are needed",
        "all-reduce 256 MB gloo: 0.03[0-9] GB/s, .*slowest from second to first \\(0.03",
        "engine: second: ",
    ]
    assert len(said) == len(expected), "\n".join(screens)
    for line, fault in zip(said, expected, strict=True):
        assert re.match(f"doctor: {fault}", line), line


def test_what_stops_one_rank_is_told_by_all(nodes: list[str], tmp_path: Path) -> None:
    """The other one does not wait for it until a deadline, to say then that nobody came."""
    faulty = rank(1, GLOO_SOCKET_IFNAME="ib0", SLURMD_NODENAME="second")
    screens = together([inside(node, *DOCTOR) for node in nodes], tmp_path, [rank(0), faulty])
    said = "GLOO_SOCKET_IFNAME names an interface that is not here"
    assert first_problem(screens[0]).startswith(f"doctor: meeting: rank 1 on second: interface: {said}"), screens[0]
    assert first_problem(screens[1]).startswith(f"doctor: interface: {said}"), screens[1]


def test_a_rank_that_does_not_come_is_named(nodes: list[str], tmp_path: Path) -> None:
    (screen,) = together([inside(nodes[0], *DOCTOR, "--timeout", "2")], tmp_path, [rank(0)])
    assert first_problem(screen) == (
        "doctor: meeting: no word within 2 s from rank 1 of 2: look at what their own doctor printed, and if their node "
        "runs at all"
    )


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"GLOO_SOCKET_IFNAME": ""}, f"interface: this machine's own name means a loopback address, .* {WIRE}$"),
        (1, {"GLOO_SOCKET_IFNAME": "ib0"}, "interface: GLOO_SOCKET_IFNAME names an interface that is not here"),
        (0, {"MASTER_PORT": None}, "place: MASTER_PORT not set"),
        (1, {}, "port: nothing answered within 1 s .*: open the port in the firewall, or see if rank 0 runs"),
    ],
)
def test_what_keeps_the_ranks_from_meeting_is_named(
    number: int, change: dict[str, str | None], message: str, nodes: list[str], tmp_path: Path
) -> None:
    env = {key: value for key, value in (rank(number) | change).items() if value is not None}
    (screen,) = together([inside(nodes[number], *DOCTOR, "--timeout", "1")], tmp_path, [env])
    assert re.match(f"doctor: {message}", first_problem(screen)), screen


def test_a_port_in_use_is_named(nodes: list[str], tmp_path: Path) -> None:
    listen = f"import socket, time; s = socket.socket(); s.bind(('', {PORT})); s.listen(); print(); time.sleep(60)"
    taken = f'"{sys.executable}" -c "{listen}" & trap "kill $!" EXIT; sleep 1; {" ".join(DOCTOR)}'
    (screen,) = together([inside(nodes[0], "sh", "-c", taken)], tmp_path, [rank(0)])
    said = first_problem(screen)
    assert said == "doctor: port: MASTER_PORT cannot be used (Address already in use): give another one", screen
