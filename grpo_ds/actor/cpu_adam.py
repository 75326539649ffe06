"""Compiles DeepSpeed's Adam for optimizer state in host memory: once for each kind of CPU, for two to five minutes.

Left to DeepSpeed it happens inside the first rank that asks, and torch waits without end for a lock file, which a killed
build leaves behind. Here the library has a folder of its own beside torch's: one process builds, in a child with a
deadline, and the others wait for a lock that the kernel takes off the dead. Only a whole library gets its name, so who
finds it needs no lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_ds.config import RecipeError
from grpo_ds.guarded import run_guarded

NAME = "cpu_adam"
"""Of DeepSpeed's operator, the library and the Python module in it."""
_WAY_OUT = "or take zero3.json, which keeps the optimizer on the device"
_INSTALL = "install a C++ compiler and Python's headers (on Debian and Ubuntu: apt-get install g++ python3-dev)"


def library_folder(root: Path, *facts: str) -> Path:
    """The library's folder under torch's folder for extensions; another one for other `facts` or another kind of CPU.

    The compiler uses every instruction of the CPU that it runs on, and home directories are shared between nodes.
    """
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line for line in info if line.startswith(("flags", "Features"))][:1]
    key = hashlib.sha256(repr([facts, platform.machine(), sys.implementation.cache_tag, cpu]).encode()).hexdigest()
    return root / "grpo_ds" / f"{NAME}-{key[:16]}"


def ensure_library(folder: Path, command: Sequence[str], timeout_s: float) -> Path:
    """The library, which `command` builds as torch does (under TORCH_EXTENSIONS_DIR) unless it is there.

    Every rank may call it. Raises RecipeError where it cannot be built within `timeout_s`.
    """
    library = folder / f"{NAME}.so"
    if library.is_file():
        return library
    deadline = time.monotonic() + timeout_s
    with _locked(folder, deadline, timeout_s) as lock:
        if not library.is_file():
            _build(library, command, deadline, timeout_s, lock)
    return library


def load_library(library: Path) -> Any:
    """The Python module in the library."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _locked(folder: Path, deadline: float, timeout_s: float) -> Iterator[int]:
    """Holds the folder's lock; yields its file descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "a") as file:
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise RecipeError(
                        f"actor.deepspeed: another process has been compiling DeepSpeed's CPU Adam in {folder} for "
                        f"{timeout_s:g} s (train.start_timeout_s): see build.log there, {_WAY_OUT}"
                    )
                time.sleep(0.2)
            yield file.fileno()
    except OSError as error:
        raise RecipeError(
            f"actor.deepspeed: DeepSpeed's CPU Adam cannot be compiled in {folder} ({error.strerror}): set "
            "TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _build(library: Path, command: Sequence[str], deadline: float, timeout_s: float, lock: int) -> None:
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise RecipeError(
            f"actor.deepspeed: an optimizer in host memory (offload_optimizer) needs DeepSpeed's CPU Adam, which is "
            f"compiled once, and there is no compiler {compiler}: {_INSTALL}, {_WAY_OUT}"
        )
    partial, log = library.with_name("partial"), library.with_name("build.log")
    if partial.exists():
        print(f"grpo_ds: removed {partial}, which a build that was cut off has left behind", file=sys.stderr)
        shutil.rmtree(partial)
    print(f"grpo_ds: compiling DeepSpeed's CPU Adam, some minutes, once (log in {log})", file=sys.stderr)
    code = _run(command, partial, log, deadline, lock)
    built = partial / NAME / library.name
    if code == 0 and built.is_file():
        os.replace(built, library)
    shutil.rmtree(partial, ignore_errors=True)
    if code is None:
        raise RecipeError(
            f"actor.deepspeed: DeepSpeed's CPU Adam was not compiled within {timeout_s:g} s (see {log}): raise "
            f"train.start_timeout_s, {_WAY_OUT}"
        )
    if not library.is_file():
        raise RecipeError(
            f"actor.deepspeed: DeepSpeed's CPU Adam could not be compiled: {_cause(log)} (all of it in {log}): "
            f"{_INSTALL}, {_WAY_OUT}"
        )


def _run(command: Sequence[str], partial: Path, log: Path, deadline: float, lock: int) -> int | None:
    """The command's exit code; None: it missed the deadline. All that it started ends with it, and with this process."""
    # ninja lies beside Python, also where the environment was not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environ = {"TORCH_EXTENSIONS_DIR": str(partial), "PATH": path}
    log.unlink(missing_ok=True)
    # The guard holds the lock, too: if this process is killed, it is taken off only when nothing writes here any more.
    return run_guarded(command, log, max(0.0, deadline - time.monotonic()), environ, pass_fds=[lock])


def _cause(log: Path) -> str:
    """The compiler's first complaint, or the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = next((line for line in lines if " error: " in line), lines[-1] if lines else "it left no library")
    return found[:300]
