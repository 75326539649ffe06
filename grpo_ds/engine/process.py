"""A server of our own: one process under its guard, with a log, a folder for its temporary files, and a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import grpo_ds
from grpo_ds.config import RecipeError
from grpo_ds.engine.base import EngineError
from grpo_ds.engine.scratch import PREFIX, Scratch

_PORT_TRIES = 3
_LOG_TAIL_BYTES = 12000
_END_S = 15.0
"""Seconds in which a guard must have ended its server, and then in which it must have ended after SIGKILL."""
_LONGEST_TMPDIR = 107 - len(f"/{PREFIX}12345678") - len("/01234567-0123-0123-0123-0123456789ab")
"""Bytes: the path of a Unix socket has at most 107 (man 7 unix), and vLLM's sockets in our folder are named so."""


class ServerProcess:
    """Starts a server on loopback and ends it. It dies with this process, however that ends (`grpo_ds.engine.guard`)."""

    def __init__(
        self,
        label: str,
        command: Callable[[int], list[str]],
        env: dict[str, str],
        log: Path,
        port: int | None,
        noise: Callable[[str], bool],
    ) -> None:
        """command: the command line for a port. port: null takes a free one. noise: whether a line of the log says nothing.

        Raises RecipeError for a port that is taken and for a TMPDIR that has no room for the server's sockets.
        """
        _require_short(tempfile.gettempdir())
        self.label = label
        self.url = ""
        self._command = command
        self._env = env
        self._log = log
        self._port = port
        self._noise = noise
        self._log_start = 0
        self._tries = 0
        self._guard: subprocess.Popen[bytes] | None = None
        self._scratch: Scratch | None = None
        if port is not None:
            _require_free(port)

    @property
    def pid(self) -> int:
        """Of the guard, whose child the server is."""
        assert self._guard is not None, "not started"
        return self._guard.pid

    def start(self) -> None:
        """Begin to start the server, once."""
        if self._guard is None:
            self._launch()

    def _launch(self) -> None:
        self._tries += 1
        port = self._port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch(mode=0o600)
        self._log_start = self._log.stat().st_size
        # Sockets and files that a killed server leaves are removed with this folder.
        self._scratch = Scratch()
        folder = str(self._scratch.path)
        guard = [sys.executable, "-m", "grpo_ds.engine.guard", "--log", str(self._log), "--scratch", folder]
        # Its own session: Ctrl-C goes to the trainer alone, which then ends the engine.
        self._guard = subprocess.Popen(
            [*guard, "--", *self._command(port)],
            stdin=subprocess.PIPE,
            env=self._env | {"TMPDIR": folder},
            start_new_session=True,
        )

    def check(self) -> None:
        """Raises EngineError when the server ended; one that lost its port to another process is started again."""
        if self._guard is None:
            raise EngineError(f"the {self.label} server was not started: call start() before wait_ready()")
        code = self._guard.poll()
        if code is None:
            return
        if "address already in use" in self.log_tail().lower() and self._port is None and self._tries < _PORT_TRIES:
            self._remove_scratch()
            self._launch()
            return
        raise self.error(f"the {self.label} server ended with exit code {code} before it was ready")

    def alive(self) -> bool:
        """Whether the guard runs; it ends with the server."""
        return self._guard is not None and self._guard.poll() is None

    def close(self) -> None:
        """End the server and everything it started. May be called more than once."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        guard.stdin.close()  # the guard's signal to end the server
        try:
            guard.wait(_END_S)
        except subprocess.TimeoutExpired:
            guard.kill()  # the kernel then kills the server
            self._wait_killed(guard)
        self._remove_scratch()  # the guard did it, unless it was killed

    def _wait_killed(self, guard: subprocess.Popen[bytes]) -> None:
        try:
            guard.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise EngineError(
                f"process {guard.pid}, the guard of the {self.label} server, did not end within {_END_S:g} s of SIGKILL: a "
                "device or file system that it waits for does not answer; look at it with `cat /proc/PID/stack`"
            ) from None

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            self._scratch.remove()

    def error(self, message: str) -> EngineError:
        """An error that ends with the end of the log."""
        return EngineError(f"{message}\n--- end of {self._log} ---\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The end of what this server wrote."""
        if not self._log.exists():
            return "(no log was written)"
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if not self._noise(line))


def server_env(device: str, defaults: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The trainer's environment without what torchrun put there, which would make engines join the trainer's group.

    device: "cpu" or "cuda". The environment wins over `defaults`.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in torchrun and not k.startswith(("MASTER_", "TORCHELASTIC_"))}
    root = str(Path(grpo_ds.__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    # More threads spin at each other's cost when cores are shared with the trainer.
    ours = {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    if device == "cpu":
        # malloc keeps what is freed: each weight update takes and frees the model's bytes, and a quarter of its CPU time
        # went into taking pages from the kernel anew. 16 GiB stand for "never give back".
        ours |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    return ours | dict(defaults) | env


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RecipeError(
                f"engine.args.port is {port}, which cannot be used ({error.strerror}): give another port, or none"
            ) from error


def _require_short(folder: str) -> None:
    if (length := len(os.fsencode(folder))) > _LONGEST_TMPDIR:
        raise RecipeError(
            f"environment variable TMPDIR: {folder} has {length} characters, and the engine's sockets there could have no "
            f"name, because the kernel takes only {_LONGEST_TMPDIR} here: set TMPDIR to a shorter folder, such as /tmp"
        )
