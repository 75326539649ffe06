"""`grpo_ds.selftest` on two nodes: all ranks agree on a folder that every node sees, and nothing of it is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.harness import free_port
from tests.slurm.cluster import Cluster
from tests.slurm.namespaces import TOGETHER_S, environment, inside, together, torchrun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

MODULE = ["-m", "grpo_ds.selftest"]


def options(recipe: Path) -> list[str]:
    return ["--recipe", str(recipe), "--engine.kind", "hf", "--run.dir", "runs/here"]


def test_two_nodes_without_a_common_temporary_folder_pass(nodes: list[str], recipe: Path, tmp_path: Path) -> None:
    """Each node has a /tmp of its own, played by a folder in which it mounts one."""
    (tmp_path / "tmp").mkdir()
    own = f"mount -t tmpfs none {tmp_path / 'tmp'}"
    commands = [inside(node, *torchrun(k), *MODULE, *options(recipe), setup=own) for k, node in enumerate(nodes)]
    screens = together(commands, tmp_path, [environment(TMPDIR=str(tmp_path / "tmp"))] * 2)
    assert "selftest: nothing moved, and changed weights arrive" in screens[0], "\n".join(screens)
    assert not (tmp_path / "runs").exists(), "the folder, and those that were made for it, are gone"


def test_slurms_own_launcher_is_understood(cluster: Cluster, recipe: Path, home: Path) -> None:
    cluster.env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *MODULE, *options(recipe)]
    screen = cluster.command("srun", "--nodes=2", "--ntasks-per-node=1", *command, cwd=home, timeout_s=TOGETHER_S)
    assert screen.count("selftest: nothing moved, and changed weights arrive") == 1, screen
