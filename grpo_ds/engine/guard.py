"""Runs a server so that it never outlives its owner: `python -m grpo_ds.engine.guard --log FILE [--scratch DIR] -- CMD ...`.

The owner holds the write end of the guard's stdin and never writes. The server's whole process group is ended when
that pipe closes, when the owner is gone, when the guard gets SIGTERM or SIGINT, and when the server's first process
dies. If the guard itself is killed, the kernel kills the server (see `die_with_parent`).
Then the folder for the server's temporary files is removed: what is killed leaves sockets and files behind. Python's
resource trackers among the processes are not killed: they remove the semaphores of the others, and end by themselves.
The guard exits with the server's exit code, or 128 + signal number. Standard library only, Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_S = 3.0
"""Seconds between SIGTERM and SIGKILL."""
_POLL_S = 0.25
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def die_with_parent() -> None:
    """Have the kernel send this process SIGKILL when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _children() -> list[int]:
    """This process' living children; orphans of the server are among them, because the guard is their subreaper."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids]


def _terminate(group: int) -> None:
    for kill, pid in [(os.killpg, group), *((os.kill, child) for child in _children())]:
        try:
            kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue  # it ended by itself in the meantime


def _kill_children(spare_trackers: bool) -> None:
    """SIGKILL; whose parent dies becomes the guard's own child, and is met by the next call."""
    for pid in _children():
        if spare_trackers and _tracks_resources(pid):
            continue
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself in the meantime


def _tracks_resources(pid: int) -> bool:
    """Whether it is one of Python's: it removes the semaphores of its processes once they are gone, and then ends."""
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _reap() -> bool:
    """Collect ended children; True when none is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """End everything the server started: SIGTERM, GRACE_S seconds, SIGKILL until nothing is left, trackers last."""
    _terminate(server.pid)
    deadline = time.monotonic() + GRACE_S
    while True:
        server.poll()
        if _reap():
            return
        if (late := time.monotonic() - deadline) > 0:
            _kill_children(spare_trackers=late < GRACE_S)
        time.sleep(0.05)


def run(command: list[str], log_path: str) -> int:
    """Run command until it ends or its owner does; returns the exit code."""
    owner = os.getppid()
    stop = False

    def on_signal(signum: int, frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with open(log_path, "ab", buffering=0) as log:
        try:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            log.write(f"cannot run {command[0]}: {error.strerror}\n".encode())
            return 127
    while not stop and server.poll() is None:
        # A child that the owner forked may keep the pipe open, so the owner's own end is watched too.
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], _POLL_S)
        stop = stop or bool(readable and not os.read(sys.stdin.fileno(), 4096)) or os.getppid() != owner
    _end(server)
    code = server.returncode if server.returncode is not None else 0
    return code if code >= 0 else 128 - code


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a server that ends with the process that started it.")
    parser.add_argument("--log", required=True, help="file that gets the server's output, appended")
    parser.add_argument("--scratch", help="folder that is removed when everything has ended")
    parser.add_argument("command", nargs="+", help="the server's command line, after --")
    args = parser.parse_args()
    try:
        return run(args.command, args.log)
    finally:
        if args.scratch:
            shutil.rmtree(args.scratch, ignore_errors=True)  # the owner may be removing it too


if __name__ == "__main__":
    sys.exit(main())
