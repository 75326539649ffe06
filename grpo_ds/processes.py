"""How a rank learns who it is under SLURM, and how it ends: on request, with its launcher, with the cause last on the
screen. No torch here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NoReturn

from grpo_ds.config import RecipeError

STOP_SIGNAL = signal.SIGUSR1
"""Asks the run for a checkpoint at the end of its round and an end; SLURM sends it before the time limit."""

_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Ask for an end at once."""

STOPPED = 75
"""Exit code of a run that ended at its own request and goes on with --resume (EX_TEMPFAIL)."""

_LAUNCHER_COMMANDS = ("deepspeed", "deepspeed.pt", "ds", "torchrun")
"""What DeepSpeed and PyTorch install; all of them are scripts that Python runs."""
_LAUNCHER_MODULES = r"deepspeed\.launcher\.\w+|torch\.distributed\.(run|launch)"
_LAUNCHER_FILES = r"(.*/)?(deepspeed/launcher/\w+|torch/distributed/(run|launch))\.py"


def _command(pid: int) -> list[str]:
    """The words of a process' command line; none when it is gone."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    # Each word ends with NUL, but for those of a process that has given itself a title.
    return text.removesuffix("\0").split("\0") if text else []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _started(pid: int) -> str:
    """Start time of a live process; empty when it is gone (a zombie counts as gone)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_launcher(command: Sequence[str]) -> bool:
    """Python running a launcher; what only names one, as a shell or a folder does, may end long before the run does."""
    if not command or not os.path.basename(command[0]).startswith("python"):
        return False
    module, script = _what_runs(command)
    if os.path.basename(script) in _LAUNCHER_COMMANDS:
        return True
    return bool(re.fullmatch(_LAUNCHER_MODULES, module) or re.fullmatch(_LAUNCHER_FILES, script))


def _what_runs(command: Sequence[str]) -> tuple[str, str]:
    """(module, script) of a Python command line; one of them is empty, or both.

    >>> _what_runs(["python3", "-X", "dev", "-um", "torch.distributed.run", "train.py"])
    ('torch.distributed.run', '')
    """
    words = iter(command[1:])
    for word in words:
        if not word.startswith("-"):
            return "", word
        if word.startswith("--"):
            next(words, "")  # --check-hash-based-pycs MODE is the only one that can be followed by a program
            continue
        # Letters may stand together; one that takes a value takes the rest of the word, or the next one.
        option = next((letter for letter in word if letter in "mcXW"), "")
        value = (word.partition(option)[2] or next(words, "")) if option else ""
        if option in ("m", "c"):
            return (value, "") if option == "m" else ("", "")
    return "", ""


def launchers() -> list[int]:
    """The launcher processes above this one (deepspeed has two), nearest first; none under plain python."""
    chain = []
    pid = os.getppid()
    while pid > 1 and _is_launcher(_command(pid)):
        chain.append(pid)
        pid = _parent(pid)
    return chain


def hold_stop_request() -> None:
    """Keeps a stop request pending until the loop asks; call it while the process has one thread.

    Under srun SIGTERM is one, too: that is what a preempted job gets, and SIGKILL follows by itself after a grace time.
    A handler would do for this process, but SLURM signals all processes of a step: what is started from here inherits
    the blocked signals, and neither the engine nor a reward process dies of them.
    """
    if _under_srun():
        resource_tracker.ensure_running()  # it unblocks SIGTERM when it starts, so it must not start later
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})


def _under_srun() -> bool:
    """Whether srun started this process itself, and not a launcher that ends its ranks by SIGTERM."""
    return "SLURM_STEP_ID" in os.environ and not launchers()


def stop_requested() -> bool:
    """Whether somebody has asked this process to stop at the end of the round."""
    return not {STOP_SIGNAL, signal.SIGTERM}.isdisjoint(signal.sigpending())


_told_to_end = threading.Event()
"""Set by the first end request."""


def on_end_request(act: Callable[[str, int], None]) -> None:
    """Has a thread call act(name of the signal, exit code) once, at the first SIGTERM or SIGHUP.

    In a thread, because the main thread runs no handler while it waits in a collective. Signals that are ignored
    (nohup) or that ask for a stop at the end of the round (`hold_stop_request`) are left alone. Main thread only.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in set(_END_SIGNALS) - signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _nothing)

    def wait() -> None:
        while (number := signal.Signals(os.read(heard, 1)[0])) not in _END_SIGNALS:
            continue  # Ctrl-C reaches the main thread as KeyboardInterrupt
        _told_to_end.set()
        act(number.name, 128 + number)

    threading.Thread(target=wait, name="end-request", daemon=True).start()


def _nothing(number: int, frame: object) -> None:
    """The thread does it."""


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Names this process' rank as the other launchers do, where srun started it and none of them did.

    Raises RecipeError for steps whose nodes do not run the same number of consecutive ranks each.
    """
    if "RANK" in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return
    rank, world, local = (int(environ[f"SLURM_{k}"]) for k in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    tasks = environ["SLURM_STEP_TASKS_PER_NODE"]
    same = re.fullmatch(r"(\d+)(?:\(x\d+\))?", tasks)
    if not same:
        raise RecipeError(
            f"SLURM gave the nodes different numbers of tasks ({tasks}): ask for --nodes and --ntasks-per-node, not for "
            "--ntasks alone"
        )
    per_node = int(same[1])
    if rank != int(environ["SLURM_NODEID"]) * per_node + local:
        raise RecipeError("SLURM spread consecutive ranks over the nodes: start them with srun --distribution=block")
    if world > 1 and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
        raise RecipeError(
            "MASTER_ADDR and MASTER_PORT are not set, so the ranks cannot find each other: set them to the first node "
            "and a free port of it before srun, as launch/slurm.sbatch does"
        )
    environ["RANK"], environ["WORLD_SIZE"] = str(rank), str(world)
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(local), str(per_node)


def end_with_launcher(poll_s: float = 0.5) -> None:
    """Ends this process when any launcher above it ends: a killed launcher cannot tell its ranks.

    The engine and the reward processes follow, because they end with this process. SLURM's step daemon counts too: it
    is what connects a rank to its job.
    """
    above = {pid: _started(pid) for pid in launchers()}
    nearest = next(iter(above), None)
    if nearest is None and "".join(_command(os.getppid())).startswith("slurmstepd"):
        above = {os.getppid(): _started(os.getppid())}
    if not above:
        return

    def watch() -> None:
        while all(_started(pid) == start for pid, start in above.items()):
            time.sleep(poll_s)
        if nearest is not None:
            cause = "the launcher was ended from outside, so the run ended too"
            _speak_after(nearest, above[nearest], cause, _AFTER_OWN_CAUSES_S)
        os._exit(143)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


_LAST_WORDS = """
import os, socket, sys, time
if os.fork():
    os._exit(0)
parent, start, patience, text = sys.argv[1:]
name = "\\0grpo_ds last words " + parent + " " + start
lock = socket.socket(socket.AF_UNIX)
def claim():
    try:
        lock.bind(name)
    except OSError:
        os._exit(0)
if not float(patience):
    claim()
deadline = time.monotonic() + 45
while time.monotonic() < deadline:
    try:
        fields = open(f"/proc/{parent}/stat").read().rsplit(")", 1)[1].split()
    except OSError:
        break
    if fields[0] in "ZX" or fields[19] != start:
        break
    time.sleep(0.01)
if float(patience):
    time.sleep(float(patience))
    claim()
os.write(2, text.encode())
os.close(1)
os.close(2)
time.sleep(2)
"""
"""Speaks once for all ranks of a launcher: who has bound the abstract socket may, and the kernel forgets it at the end.

It forks first: the launcher ends a rank together with its descendants, and an orphan is none.
"""


_AFTER_OWN_CAUSES_S, _AFTER_THE_LAUNCHER_S = 0.3, 1.0
"""Who waits longer speaks only where nobody knew better: first a rank with a cause of its own, then one that saw its
launcher ended, then one that only lost a peer."""


def _speak_after(launcher: int, started: str, cause: str, patience_s: float) -> None:
    """Has `cause` printed `patience_s` seconds after the launcher's end, unless another rank has spoken by then."""
    arguments = [str(launcher), started, str(patience_s), f"\ngrpo_ds: stopped: {cause}\n"]
    speaker = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _LAST_WORDS, *arguments], start_new_session=True, stdin=subprocess.DEVNULL
    )
    speaker.wait(timeout=10)


def say_last(cause: str, *, peer: bool = False, peer_delay_s: float = 5.0) -> None:
    """Prints the cause after whatever the launcher still has to say about this rank's end, once for all its ranks.

    Under a launcher a tiny process of its own session waits for the launcher's end and writes then, so that the cause
    is the last thing on the screen; without one the cause is printed at once. peer: this rank only noticed that another
    one failed; it speaks where no other does, and waits peer_delay_s seconds to let the launcher hear of the other.
    """
    above = launchers()
    if above:
        # The launcher may be ending this rank and its descendants already; the cause is handed over first. Ignored
        # signals are inherited. Only the main thread may set them.
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
        _speak_after(above[0], _started(above[0]), cause, _AFTER_THE_LAUNCHER_S if peer else 0.0)
        if main:
            signal.signal(signal.SIGTERM, before)
    if peer:
        _told_to_end.wait(peer_delay_s)
    if not above:
        sys.stderr.write(f"\ngrpo_ds: stopped: {cause}\n")
        sys.stderr.flush()


def leave(code: int) -> NoReturn:
    """Ends the process at once, what it printed written. What it opened must be closed before.

    Not through the end of the interpreter: gloo's threads may still hold a collective's tensors then, and letting go of
    them aborts a process that has done all its work (pytorch/pytorch#190489: 2 of 108 ranks on two cores);
    after a failure it would wait for collectives that never complete.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_peer_failure(error: BaseException) -> bool:
    """Whether a rank failed only because it could not reach another one (which then has the cause)."""
    found: BaseException | None = error
    while found is not None:
        # Collectives inside DeepSpeed fail with plain RuntimeErrors of the backend.
        if type(found).__name__ in ("PeerError", "DistBackendError") or "gloo/transport" in str(found):
            return True
        found = found.__cause__
    return False
