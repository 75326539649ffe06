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

from grpo_ds.doctor import _write_token
from grpo_ds.doctor_checks import (
    Facts,
    Finding,
    check_bandwidth,
    check_clocks,
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
    Facts(r, f"n{r // 2}", VERSIONS, 1000.0 + r / 100, True, 8.0, 64.0, 2, {"256 MB gloo": 1.0}, "") for r in range(4)
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
    ("bandwidth", {"gb_s": {"256 MB gloo": 0.01}}, "0.010 GB/s is slower than 1 Gbit Ethernet"),
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
    for check in ("place", "interface", "port", "versions", "clocks", "shared folder", "/dev/shm", "memory"):
        assert re.search(rf"^{check} +ok", done.stdout, re.MULTILINE), check
    rates = [float(rate) for rate in re.findall(r"([0-9.]+) GB/s", done.stdout)]
    assert len(rates) == 2 and all(rate > 0 for rate in rates)
    assert not list((tmp_path / "runs").iterdir()), "its own file is gone"
