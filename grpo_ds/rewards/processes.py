"""The killable processes that run reward functions: Pebble's pool, and the ways in which it can end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pebble import ProcessPool

from grpo_ds.rewards import worker

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""Deadline for all processes to end, in seconds."""


class _TrackingContext(SpawnContext):
    """Remembers the processes it made, so that exactly these can be ended by their id."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[BaseProcess] = []

    # SpawnContext keeps the process class in this attribute; the pool calls it like a function.
    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:  # type: ignore[override]
        process = SpawnContext.Process(*args, **kwargs)
        self.made = [*(old for old in self.made if old.is_alive()), process]
        return process


class WorkerProcesses:
    """`count` processes with the functions of `specs`, each with its options, loaded; a dead or killed process is replaced.

    The processes die with the THREAD that first called `submit` (Linux' parent-death signal belongs to a
    thread), so that should be one that lives as long as the run; if it does end, the next call starts new processes.
    """

    def __init__(
        self, specs: Sequence[str], options: Sequence[Mapping[str, Any]], base_dirs: Sequence[Path], count: int
    ) -> None:
        self._functions = [(spec, dict(given)) for spec, given in zip(specs, options, strict=True)]
        self._base_dirs, self._count = [str(base) for base in base_dirs], count
        self._pool: ProcessPool | None = None
        self._context: _TrackingContext | None = None

    def submit(self, function: Callable[..., Any], arguments: Sequence[Any], timeout_s: float | None) -> Future[Any]:
        """Schedules one call. The future fails with TimeoutError (deadline missed, process killed), ProcessExpired
        (the process died in the call) or BrokenProcessPool (processes died outside any call: `restart` and repeat)."""
        if self._pool is None or not self._pool.active:
            self.restart()
        assert self._pool is not None
        try:
            return self._pool.schedule(function, args=arguments, timeout=timeout_s)
        except RuntimeError as error:  # the pool broke between the look and the call
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool(str(error)))
            return future

    def restart(self) -> None:
        """Ends what is left of the old processes and makes new ones."""
        self.close()
        self._context = _TrackingContext()
        self._pool = ProcessPool(
            max_workers=self._count,
            initializer=worker.start,
            initargs=(self._functions, self._base_dirs, os.getpid()),
            context=self._context,
        )

    def pids(self) -> list[int]:
        """Ids of the living processes."""
        made = self._context.made if self._context else []
        return [process.pid for process in made if process.pid is not None and process.is_alive()]

    def close(self) -> None:
        """Ends all processes within CLOSE_S seconds, whatever they are doing. May be called again."""
        if self._pool is None or self._context is None:
            return
        pool, context, deadline = self._pool, self._context, time.monotonic() + CLOSE_S
        self._pool = None
        pool.stop()  # from here on the pool replaces no process
        _kill(context.made)
        # join() has no deadline of its own, so it runs in a thread that can be left behind.
        joiner = threading.Thread(target=pool.join, name="reward-pool-join", daemon=True)
        joiner.start()
        joiner.join(max(0.0, deadline - time.monotonic()))
        _kill(context.made)  # one that the pool was starting at the moment it was stopped
        for process in context.made:
            process.join(max(0.0, deadline - time.monotonic()))
        left = self.pids()
        if left or joiner.is_alive():
            log.warning("reward processes %s had not ended %.0f s after they were killed", left, CLOSE_S)
        self._context = None


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
