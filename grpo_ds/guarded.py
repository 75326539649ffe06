"""Commands that end with the process that started them, however that ends, and all that they started with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_END_S = 30.0
"""Seconds in which a guard must have ended a command that is not wanted any more."""


def run_guarded(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    environ: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> int | None:
    """The exit code of a command that the engines' guard runs, or None: it was ended after limit_s seconds.

    log: gets its output, appended. environ: variables beside this process' own; those that make a process a rank are left
    out. pass_fds: files that the guard holds open.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = inherited | dict(environ or {})
    root = str(Path(__file__).resolve().parents[1])  # a checkout works without being installed
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "grpo_ds.engine.guard", "--log", str(log), "--", *command]
    with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, pass_fds=pass_fds, start_new_session=True) as guard:
        try:
            return guard.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            assert guard.stdin is not None
            guard.stdin.close()  # the guard's signal to end the command
            try:
                guard.wait(_END_S)
            except subprocess.TimeoutExpired:
                guard.kill()  # the kernel then kills the command
