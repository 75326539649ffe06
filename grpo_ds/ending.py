"""How a run ends: once, with its exit code, the cause last on the screen, and its child processes gone.

The main thread ends it when the work is done or has failed, and a thread of its own when a signal asks for the end: the
main thread may wait in a collective, where it hears nothing. Whoever comes first decides the cause.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from typing import NoReturn, Protocol

from grpo_ds.config import RecipeError
from grpo_ds.processes import STOPPED, is_peer_failure, launchers, leave, on_end_request, say_last

_AFTER_SIGNAL_S = 12.0
"""Seconds for the child processes to end before this one ends without them; they follow by themselves."""

_ending = threading.Lock()
"""Taken by who ends the process, and never given back."""


class StopRequested(Exception):
    """The run was asked to stop and has written a checkpoint; not an error."""


class Ends(Protocol):
    """What is closed at the end."""

    def close(self) -> None:
        """Ends child processes; safe to call twice."""

    def after_lost_peer(self) -> str:
        """Where the run was, and which peers are gone, for the cause of a collective that failed."""


def rank() -> int:
    """This process' rank as its launcher says."""
    return int(os.environ.get("RANK", "0"))


def end_on_signal(run: Ends) -> None:
    """Has SIGTERM and SIGHUP end the process within seconds, with exit code 128 + signal."""

    def act(name: str, code: int) -> None:
        # A launcher ends its ranks because one of them failed, or because it was told to: whoever knows more speaks.
        threading.Timer(_AFTER_SIGNAL_S, os._exit, [code]).start()
        told = "the launcher, or somebody else, sent this rank" if launchers() else "the run was sent"
        end(run, code, f"{told} {name}, which ends it", peer=bool(launchers()), peer_delay_s=0.0)

    on_end_request(act)


def end(
    run: Ends,
    code: int,
    cause: str | None,
    *,
    peer: bool = False,
    peer_delay_s: float = 5.0,
    error: BaseException | None = None,
) -> NoReturn:
    """Ends the process; a cause of None is left to another rank to say. error: shown whole before the cause.

    Waits for ever where another thread ends it: what this one met then is not the cause.
    """
    if not _ending.acquire(blocking=False):
        while True:
            time.sleep(1.0)
    try:
        if error is not None:
            traceback.print_exception(error)
        if cause is not None:
            say_last(f"rank {rank()}: {cause}" if rank() else cause, peer=peer, peer_delay_s=peer_delay_s)
        run.close()
    except Exception:  # the run ends in any case, and both reasons are shown
        traceback.print_exc()
    finally:
        leave(code)


def end_after(run: Ends, error: BaseException) -> NoReturn:
    """Ends the process for what was raised: 2: wrong input, 75: stopped on request, 130: interrupted, 1: failed."""
    if isinstance(error, StopRequested):
        end(run, STOPPED, str(error) if rank() == 0 else None)
    if isinstance(error, KeyboardInterrupt):
        end(run, 130, "interrupted")
    if isinstance(error, RecipeError):
        # All ranks read the same recipe, so the first one speaks for them.
        end(run, 2, str(error), peer=rank() != 0)
    peer = is_peer_failure(error) or (type(error).__name__ in ("SyncError", "ParityError") and rank() != 0)
    end(run, 1, _sentence(run, error, peer), peer=peer, error=None if peer else error)


def _sentence(run: Ends, error: BaseException, peer: bool) -> str:
    """The cause of the end in one line."""
    # A server's log, after a line of dashes, stands in the traceback.
    cause = f"{type(error).__name__}: {' '.join(str(error).partition(chr(10) + '--- ')[0].split())}"
    if peer and type(error) is RuntimeError:  # of a collective inside DeepSpeed
        return f"a collective of DeepSpeed failed at {run.after_lost_peer()}: {cause[:300]}"
    return cause
