"""The doctor names each fault that is planted, and finds nothing where there is none."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_ds import doctor
from grpo_ds.doctor import _fastest_gbit, _write_token
from grpo_ds.doctor_checks import (
    Facts,
    Finding,
    check_bandwidth,
    check_clocks,
    check_cpus,
    check_devices,
    check_engine,
    check_folder,
    check_interface,
    check_memory,
    check_place,
    check_port,
    check_shm,
    check_versions,
    table,
)

VERSIONS = {"python": "3.11.2", "torch": "2.13.0", "deepspeed": "0.19.8"}
SOUND = [
    Facts(r, f"n{r // 2}", VERSIONS, 1000.0 + r / 100, True, 8.0, 64.0, 2, {"256 MB gloo": 1.0}, 1.0 - r % 2)
    for r in range(4)
]
ENV = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0"}
ENV["MASTER_PORT"] = "29500"

CHECKS: dict[str, Callable[[list[Facts]], Finding]] = {
    "versions": check_versions,
    "clocks": check_clocks,
    "folder": lambda ranks: check_folder(ranks, "runs"),
    "shm": check_shm,
    "memory": check_memory,
    "bandwidth": lambda ranks: check_bandwidth(ranks, "256 MB gloo"),
    "engine": check_engine,
}
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("versions", {"versions": VERSIONS | {"torch": "2.12.1"}}, "torch is 2.12.1 on n1 and 2.13.0 on n0"),
    ("versions", {"versions": VERSIONS | {"vllm": "0.32.0"}}, "vllm is 0.32.0 on n1 and not there on n0"),
    ("clocks", {"clock_s": 1060.0}, "n1 is 60.0 s ahead of n0"),
    ("folder", {"sees_folder": False}, "n1 does not see a file that n0 wrote there"),
    ("shm", {"shm_gib": 0.0625}, "n1 has 0.06 GiB free, 1 are needed"),
    ("memory", {"memory_gib": 3.0}, "n1 has 1.5 GiB a rank, 2 are needed"),
    ("bandwidth", {"gb_s": {"256 MB gloo": 0.06}}, "0.060 GB/s, slowest from n1 to n0 (1.000 GB/s): name the fast"),
    ("engine", {"engine": "n1: EngineError: no memory"}, "n1: EngineError: no memory"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_sound_nodes_pass(check: str) -> None:
    assert CHECKS[check](SOUND).problem == ""


@pytest.mark.parametrize(("check", "fault", "message"), FAULTS)
def test_a_planted_fault_is_named(check: str, fault: dict[str, Any], message: str) -> None:
    ranks = [*SOUND[:3], replace(SOUND[3], **fault)]
    assert message in CHECKS[check](ranks).problem
    others = [CHECKS[other](ranks).problem for other in CHECKS if other != check]
    assert not any(others), "no other check takes it for its own"


def test_bandwidth_is_judged_by_the_slowest_nodes_card_and_the_slow_way_is_named() -> None:
    """100 Gbit/s are 12.5 GB/s, of which a twentieth is 0.625: an all-reduce that is half as fast took another network."""
    cards = [replace(f, fastest_gbit={"gloo": 100.0, "device": 400.0}, gb_s={"256 MB gloo": 0.3}) for f in SOUND]
    cards[2] = replace(cards[2], from_before_gb_s=0.2)
    problem = check_bandwidth(cards, "256 MB gloo").problem
    assert problem.startswith("0.300 GB/s, with network cards of 100 Gbit/s, slowest from n0 to n1 (0.200 GB/s): name")
    slow = [replace(f, fastest_gbit={"gloo": 10.0}) for f in cards]
    assert check_bandwidth(slow, "256 MB gloo").problem == "", "a twentieth of 10 Gbit/s is 0.0625"
    device = [replace(f, gb_s={"256 MB device": 2.0}) for f in cards]
    assert check_bandwidth(device, "256 MB device").problem.startswith("2.000 GB/s, with network cards of 400 Gbit/s")
    assert check_bandwidth([replace(f, node="n0") for f in cards], "256 MB gloo").problem == "", "no card is on the way"


def test_the_fastest_card_is_the_kernels_word(tmp_path: Path) -> None:
    for name, speed in (("eth0", "1000"), ("eth1", "25000"), ("wlan0", "-1")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "speed").write_text(speed + "\n")
    assert _fastest_gbit(tmp_path) == {"gloo": 25.0, "device": 25.0}
    (tmp_path / "infiniband" / "mlx5_0" / "ports" / "1").mkdir(parents=True)
    (tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert _fastest_gbit(tmp_path) == {"gloo": 25.0, "device": 400.0}
    assert _fastest_gbit(tmp_path / "nowhere") == {}


def test_a_rank_that_is_bound_to_one_cpu_is_named() -> None:
    assert (
        check_cpus(64, 64, 8).problem == "" and check_cpus(8, 64, 8).problem == "" and check_cpus(1, 1, 1).problem == ""
    )
    assert "may use 1 of 64 CPUs" in check_cpus(1, 64, 8).problem
    assert "srun --cpu-bind=none" in check_cpus(1, 64, 1).problem


def test_a_rank_without_a_device_is_named() -> None:
    assert check_devices("cuda", 8, 7).problem == ""
    problem = check_devices("cuda", 1, 3).problem
    assert problem.startswith("this rank has the number 3 on its node and sees 1 of its devices (cuda): ")


def test_any_error_between_the_ranks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(*_: object) -> list[Finding]:
        raise ValueError("no such\ndevice")

    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_together", raises)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "doctor: meeting: ValueError: no such device"


def test_a_missing_variable_is_named() -> None:
    assert check_place(ENV).problem == ""
    assert check_place({}).problem == ""
    without = {k: v for k, v in ENV.items() if k != "MASTER_PORT"}
    assert "MASTER_PORT not set" in check_place(without).problem


def test_launchers_that_disagree_on_the_world_are_named() -> None:
    assert "disagree on the world size" in check_place(ENV | {"RANK": "4"}).problem


def test_an_address_that_other_nodes_cannot_reach_is_named() -> None:
    assert check_interface(ENV, "10.0.0.2", ["lo", "eth0"]).problem == ""
    problem = check_interface(ENV, "127.0.1.1", ["lo", "eth0"]).problem
    assert "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to one of eth0" in problem
    assert check_interface(ENV | {"GLOO_SOCKET_IFNAME": "eth0"}, "127.0.1.1", ["lo", "eth0"]).problem == ""
    assert check_interface(ENV | {"MASTER_ADDR": "127.0.0.1"}, "127.0.1.1", ["lo"]).problem == "", "all on one machine"


def test_an_interface_that_is_not_there_is_named() -> None:
    problem = check_interface(ENV | {"NCCL_SOCKET_IFNAME": "ib0"}, "10.0.0.2", ["lo", "eth0"]).problem
    assert problem == "NCCL_SOCKET_IFNAME names an interface that is not here: choose of lo, eth0"


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),  # gloo takes whole names
        ("GLOO_SOCKET_IFNAME", "lo,eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", False),
        ("GLOO_SOCKET_IFNAME", "^lo", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "ib,eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^lo", True),
    ],
)
def test_gloo_and_nccl_read_the_names_of_interfaces_differently(name: str, value: str, found: bool) -> None:
    problem = check_interface(ENV | {name: value}, "10.0.0.2", ["lo", "eth0"]).problem
    assert (problem == "") == found


def test_a_port_that_is_taken_or_closed_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "cannot be used (Address already in use)" in check_port("127.0.0.1", port, True, 1.0).problem
        assert check_port("127.0.0.1", port, False, 1.0).problem == ""
    assert "nothing answered within 0.3 s" in check_port("127.0.0.1", port, False, 0.3).problem
    assert check_port("127.0.0.1", port, True, 1.0).problem == ""
    assert "has no address here" in check_port("no-such-host.invalid", port, False, 0.3).problem


def test_the_table_ends_with_the_problems_in_order() -> None:
    shown = table([Finding("a", "1"), Finding("bcd", "2", "broken: mend it"), Finding("e", "3", "also")])
    assert shown.splitlines() == [
        "a    ok     1",
        "bcd  WRONG  2",
        "e    WRONG  3",
        "doctor: bcd: broken: mend it",
        "doctor: e: also",
    ]
    assert table([Finding("a", "1")]).splitlines() == ["a  ok     1", "doctor: all is well"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (reason,) = _write_token(tmp_path / "file" / "runs")
    assert "cannot write there (Not a directory): give run.dir another place" in reason
    path, content = _write_token(tmp_path / "runs")
    assert Path(path).read_text() == content


@pytest.mark.slow
def test_two_ranks_are_examined(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "grpo_ds.doctor", "--run-dir", str(tmp_path / "runs")]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("doctor: all is well")
    for check in (
        "place",
        "interface",
        "cpus",
        "devices",
        "port",
        "versions",
        "clocks",
        "shared folder",
        "/dev/shm",
        "memory",
    ):
        assert re.search(rf"^{check} +ok", done.stdout, re.MULTILINE), check
    rates = [float(rate) for rate in re.findall(r"([0-9.]+) GB/s", done.stdout)]
    assert len(rates) == 2 and all(rate > 0 for rate in rates)
    assert not list((tmp_path / "runs").iterdir()), "its own file is gone"
