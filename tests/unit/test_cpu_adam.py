"""The optimizer for host memory is compiled once, with a deadline, and a build that was killed blocks nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from grpo_ds.actor.cpu_adam import ensure_library, library_folder
from grpo_ds.actor.ds_json import load_ds_json
from grpo_ds.build import check_optimizer
from grpo_ds.config import RecipeError
from grpo_ds.recipe import read_recipe

BUILDS = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam"
folder.mkdir(parents=True)
(folder / "lock").touch()
with open(sys.argv[1], "a") as calls:
    calls.write(f"{os.getpid()}\\n")
"""
"""As torch begins a build: with a lock file, which is in the way of everybody until it is removed."""
WORKS = f"{BUILDS}(folder / 'cpu_adam.so').write_text('library')\n(folder / 'lock').unlink()\n"
HANGS = f"{BUILDS}import time\ntime.sleep(100)\n"
FAILS = f"{BUILDS}print('c++ -O3 x.cpp')\nprint('x.cpp:1: fatal error: Python.h: No such file')\nsys.exit('failed')\n"
RANK = """
import sys
from pathlib import Path
from grpo_ds.actor.cpu_adam import ensure_library
print(ensure_library(Path(sys.argv[1]), [sys.executable, "-S", "-c", *sys.argv[2:]], 60))
"""


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")


def command(code: str, calls: Path) -> list[str]:
    return [sys.executable, "-S", "-c", code, str(calls)]


def test_a_library_is_built_once_and_nothing_else_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, calls = tmp_path / "made", tmp_path / "calls"
    for _ in range(2):
        library = ensure_library(folder, command(WORKS, calls), 60)
        assert library == folder / "cpu_adam.so" and library.read_text() == "library"
    assert len(calls.read_text().splitlines()) == 1
    assert {file.name for file in folder.iterdir()} == {"cpu_adam.so", "build.log", "lock"}
    assert capfd.readouterr().err.count("\n") == 1


def test_of_processes_that_ask_at_once_one_builds(tmp_path: Path) -> None:
    folder, calls = tmp_path / "made", tmp_path / "calls"
    code = f"import time\ntime.sleep(1)\n{WORKS}"
    words = [sys.executable, "-c", RANK, str(folder), code, str(calls)]
    ranks = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == [str(folder / "cpu_adam.so")] * 3
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_build_ends_with_its_rank_and_what_it_leaves_is_removed_with_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], end: signal.Signals
) -> None:
    folder, calls = tmp_path / "made", tmp_path / "calls"
    words = [sys.executable, "-c", RANK, str(folder), HANGS, str(calls)]
    with subprocess.Popen(words) as rank:
        build = started(calls)
        rank.send_signal(end)
    build.wait(30)
    assert (folder / "partial" / "cpu_adam" / "lock").exists()
    assert ensure_library(folder, command(WORKS, calls), 60).is_file()
    assert f"removed {folder / 'partial'}, which a build that was cut off has left" in capfd.readouterr().err


def test_a_build_of_another_process_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    folder, calls = tmp_path / "made", tmp_path / "calls"
    words = [sys.executable, "-c", RANK, str(folder), HANGS, str(calls)]
    with subprocess.Popen(words) as rank:
        started(calls)
        with pytest.raises(
            RecipeError, match=r"another process has been compiling .* for 0\.5 s .*or take zero3\.json"
        ):
            ensure_library(folder, command(WORKS, calls), 0.5)
        rank.kill()


def test_a_build_that_misses_its_deadline_is_ended_with_all_it_started(tmp_path: Path) -> None:
    folder, calls = tmp_path / "made", tmp_path / "calls"
    code = f"import subprocess\nsubprocess.Popen(['sleep', '100'])\n{HANGS}"
    begun = time.monotonic()
    with pytest.raises(RecipeError, match=r"^actor\.deepspeed: .* was not compiled within 2 s .*: raise .*zero3\.json"):
        ensure_library(folder, command(code, calls), 2)
    assert time.monotonic() - begun < 20
    assert not alive(int(calls.read_text()))
    assert not (folder / "partial").exists(), "the next start begins anew"


def alive(session: int) -> list[int]:
    """The processes of a session."""
    return [pid for pid in psutil.pids() if session_of(pid) == session]


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else 0
    except (ProcessLookupError, psutil.NoSuchProcess):
        return 0


def started(calls: Path) -> psutil.Process:
    """The build, once it has its lock file."""
    deadline = time.monotonic() + 30
    while not calls.exists() or not calls.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return psutil.Process(int(calls.read_text()))


def test_a_failed_build_is_told_with_the_compilers_first_complaint(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        ensure_library(tmp_path / "made", command(FAILS, tmp_path / "calls"), 60)
    said = str(error.value)
    assert "could not be compiled: x.cpp:1: fatal error: Python.h: No such file" in said
    assert "apt-get install g++ python3-dev" in said and "zero3.json" in said and "\n" not in said
    assert not (tmp_path / "made" / "partial").exists()


def test_without_a_compiler_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RecipeError, match=r"no compiler no-such-compiler: install .*g\+\+.*, or take zero3\.json"):
        ensure_library(tmp_path / "made", command(WORKS, tmp_path / "calls"), 60)
    assert not (tmp_path / "calls").exists()


def test_a_folder_that_cannot_be_made_is_told_with_the_variable_that_moves_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"cannot be compiled in .*Not a directory.*: set TORCH_EXTENSIONS_DIR"):
        ensure_library(tmp_path / "file" / "made", command(WORKS, tmp_path / "calls"), 60)


def test_another_version_or_another_kind_of_processor_has_a_library_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [library_folder(tmp_path, "2.13.0"), library_folder(tmp_path, "2.14.0")]
    assert folders[0] == library_folder(tmp_path, "2.13.0")
    monkeypatch.setattr(Path, "read_text", lambda path: "flags\t\t: fpu avx512f\n")
    folders.append(library_folder(tmp_path, "2.13.0"))
    assert len(set(folders)) == 3 and all(folder.is_relative_to(tmp_path) for folder in folders)


def test_an_optimizer_in_host_memory_is_refused_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, bases = read_recipe(["--recipe", "quickstart"])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_optimizer(recipe, load_ds_json("zero3.json", bases, "actor.deepspeed"))
    with pytest.raises(RecipeError, match=r"^actor\.deepspeed: .*\(offload_optimizer\) .*no compiler no-such-compiler"):
        check_optimizer(recipe, load_ds_json("zero3_offload.json", bases, "actor.deepspeed"))
