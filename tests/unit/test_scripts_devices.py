"""Which packages the scripts choose, with a set-up, a GPU and a Python that are fakes in a folder of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Called for everything that setup.sh asks of Python; `-m venv DIR` makes an environment whose Python is this file again.
PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
[[ "$*" != *load_cpu_adam* ]] || { echo "$*" >>"$CALLS"; echo "RecipeError: no headers"; exit "$COMPILED"; }
"""
SAYS = """#!/bin/bash
echo "$(basename "$0") $* | $VIRTUAL_ENV ${DS_ACCELERATOR-unset} ${CUDA_VISIBLE_DEVICES-unset}" >>"$CALLS"
"""


def placed(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def scripts(folder: Path, *names: str) -> None:
    """Copies, for which this machine's own GPUs are not there."""
    for name in names:
        placed(folder / name, (ROOT / name).read_text().replace("/dev/nvidia0", str(folder / "nvidia0")))


def bash(
    folder: Path, script: str, arguments: Sequence[str], gpu: bool, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script of `folder` on a machine with GPUs or without."""
    placed(folder / "commands" / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    path = f"{folder / 'commands'}:{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=folder,
        env={**kept, "PATH": path, "CALLS": str(folder / "calls"), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- set-up ----


def set_up(folder: Path, device: str, compiler: str = "true", compiled: int = 0) -> str:
    """The line about the optimizer; the set-up itself ends well. Empty: there is none."""
    scripts(folder, "launch/setup.sh", f"launch/constraints-{device}.txt", "setup.cfg", "pyproject.toml")
    python = placed(folder / "python", PYTHON)
    env = {"PYTHON": str(python), "CXX": compiler, "COMPILED": str(compiled)}
    done = bash(folder, "setup.sh", ["--device", device], gpu=False, **env)
    assert done.returncode == 0, done.stderr
    assert (folder / ".venv" / "setup.stamp").exists() and "setup: done in" in done.stdout
    return "".join(line for line in done.stdout.splitlines() if "offloaded optimizer" in line)


def test_setup_compiles_the_offloaded_optimizer_into_the_cuda_environment(tmp_path: Path) -> None:
    line = set_up(tmp_path, "cuda")
    assert line.startswith("setup: compile the offloaded optimizer") and line.endswith(" s")
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_setup_for_a_cpu_does_not_spend_minutes_on_it(tmp_path: Path) -> None:
    assert set_up(tmp_path, "cpu") == ""
    assert not (tmp_path / "calls").exists()


def test_setup_without_a_compiler_says_what_follows_and_goes_on(tmp_path: Path) -> None:
    line = set_up(tmp_path, "cuda", compiler="no-such-compiler")
    assert "no compiler: recipes that keep the optimizer in host memory" in line and "apt-get install g++" in line
    assert not (tmp_path / "calls").exists()


def test_setup_tells_why_the_optimizer_was_not_compiled_and_goes_on(tmp_path: Path) -> None:
    assert set_up(tmp_path, "cuda", compiled=1).endswith("; what is wrong: RecipeError: no headers")


# ---- tests ----


def calls_of(folder: Path, arguments: Sequence[str], gpu: bool) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """What test.sh called, each with VIRTUAL_ENV, DS_ACCELERATOR and CUDA_VISIBLE_DEVICES."""
    scripts(folder, "launch/test.sh", "launch/groups.sh")
    placed(folder / "launch" / "setup.sh", SAYS)
    for venv in (".venv", ".venv-cpu"):
        for name in ("python", "ruff", "mypy"):
            placed(folder / venv / "bin" / name, SAYS)
    placed(folder / "grpo_ds" / "example.py", '""" \n>>> 1\n1\n"""\n')
    done = bash(folder, "test.sh", arguments, gpu, VIRTUAL_ENV="none")
    calls = folder / "calls"
    said = calls.read_text().replace(str(folder), "").splitlines() if calls.exists() else []
    return said, done


@pytest.mark.parametrize("arguments", [[], ["--slow"], ["--fast", "--slow"], ["--sglang"]])
def test_without_a_gpu_all_suites_use_the_one_environment(tmp_path: Path, arguments: list[str]) -> None:
    calls, done = calls_of(tmp_path, arguments, gpu=False)
    assert done.returncode == 0, done.stderr
    assert calls[0] == "setup.sh  | none unset unset"
    assert all(line.endswith(" | /.venv unset unset") for line in calls if not line.startswith("setup.sh"))
    assert any(line.startswith("python -m pytest") for line in calls)


@pytest.mark.parametrize("arguments", [[], ["--slow"], ["--fast", "--slow"]])
def test_beside_a_gpu_the_suites_for_the_cpu_have_an_environment_that_sees_none(
    tmp_path: Path, arguments: list[str]
) -> None:
    calls, done = calls_of(tmp_path, arguments, gpu=True)
    assert done.returncode == 0, done.stderr
    assert calls[0] == "setup.sh --device cpu --venv .venv-cpu | none cpu "
    assert all(line.endswith(" | /.venv-cpu cpu ") for line in calls[1:])
    assert any(line.startswith("python -m pytest") for line in calls)


def test_the_gpu_suite_runs_in_the_environment_of_the_product(tmp_path: Path) -> None:
    calls, done = calls_of(tmp_path, ["--gpu"], gpu=True)
    assert done.returncode == 0, done.stderr
    assert calls == ["setup.sh  | none unset unset", "python -m pytest -q -m gpu tests | /.venv unset unset"]


@pytest.mark.parametrize(
    ("arguments", "gpu", "sentence"),
    [
        (["--gpu", "--slow"], True, "--gpu runs on the CUDA packages"),
        (["--sglang"], True, "--sglang is pinned for CPU machines"),
        (["--slow", "--sglang"], True, "--sglang is pinned for CPU machines"),
        (["--gpu"], False, "--gpu needs an NVIDIA GPU"),
    ],
)
def test_a_suite_that_cannot_run_here_is_refused_before_anything_is_installed(
    tmp_path: Path, arguments: list[str], gpu: bool, sentence: str
) -> None:
    calls, done = calls_of(tmp_path, arguments, gpu)
    assert (done.returncode, calls) == (2, [])
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"test: {sentence}")
