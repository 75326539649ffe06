"""The folder of a run: a new one, or that of a run to go on with; and the lock that keeps it with one live run."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from pathlib import Path

from grpo_ds.actor.checkpoint import check_files, checkpoints_of, read_state
from grpo_ds.config import Recipe, RecipeError
from grpo_ds.runlog import SUMMARY

LOCK = "run.lock"


class RunFolder:
    """A run's folder, held until `close` or the end of this process, and the checkpoint to go on from (None: a new run)."""

    def __init__(self, path: Path) -> None:
        """Raises RecipeError where another live run holds the folder, or where nothing can be held."""
        self.path = path.resolve()
        self.checkpoint: Path | None = None
        # Not inherited by child processes: the lock ends with this process.
        self._file = open(self.path / LOCK, "a+")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "a process that has not said its name yet"
            self._file.close()
            raise RecipeError(
                f"{self.path} belongs to a run that is alive ({holder}): wait for its end or end it, or start a new run "
                "without --resume"
            ) from None
        except OSError as error:
            self._file.close()
            raise RecipeError(
                f"run.dir: the file system of {self.path} gives no locks (flock: {error.strerror}), so two runs could "
                "write into one folder: name a folder on one that does (Lustre does when mounted with -o flock)"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Lets go of the folder."""
        self._file.close()


def new_run_folder(recipe: Recipe) -> RunFolder:
    """Makes <run.dir>/<run.name>-<time>/, with .1, .2, ... behind it where that exists."""
    base = Path(recipe.run.dir) / f"{recipe.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, k = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return RunFolder(folder)
        except FileExistsError:
            folder, k = base.with_name(f"{base.name}.{k}"), k + 1


def runs_of(recipe: Recipe) -> list[Path]:
    """The runs of this run.name that have a whole checkpoint, the one with the latest last."""
    base = Path(recipe.run.dir) / recipe.run.name
    # The form of `new_run_folder`: another run's name may begin with this one's.
    form = re.compile(re.escape(base.name) + r"-\d{8}-\d{6}(\.\d+)?")
    folders = [p for p in base.parent.iterdir() if form.fullmatch(p.name)] if base.parent.is_dir() else []
    return sorted((p for p in folders if checkpoints_of(p)), key=lambda p: checkpoints_of(p)[-1].stat().st_mtime)


def find_run(recipe: Recipe) -> RunFolder:
    """The run's folder, with the checkpoint to go on from.

    resume auto: the newest run of run.name that has a whole checkpoint, else a new run. resume PATH: that run. Refuses a
    run that is alive or finished; one that was killed after its last round is neither. Main rank only.
    """
    if recipe.resume is None:
        return new_run_folder(recipe)
    if recipe.resume == "auto":
        runs = runs_of(recipe)
        if not runs:
            base = Path(recipe.run.dir) / recipe.run.name
            print(f"resume auto: no run of {base}-<time> has a checkpoint, so a new one starts")
            return new_run_folder(recipe)
        path = runs[-1]
    else:
        path = Path(recipe.resume)
        if not checkpoints_of(path):
            raise RecipeError(f"--resume {path}: no whole checkpoint under {path}/checkpoints; name a run's folder")
    run = RunFolder(path)
    run.checkpoint = checkpoints_of(run.path)[-1]
    state = read_state(run.checkpoint)
    done = state.round
    if recipe.train.rounds <= done <= summarised_rounds(run.path):
        run.close()
        raise RecipeError(
            f"--resume: {run.checkpoint} already holds {done} rounds and train.rounds is {recipe.train.rounds}: raise "
            "train.rounds, or start a new run without --resume"
        )
    check_files(run.checkpoint, state)
    return run


def summarised_rounds(run: Path) -> int:
    """The rounds of the run's summary, which is the last thing that is written; -1 where there is none."""
    path = run / SUMMARY
    return int(json.loads(path.read_text())["rounds"]) if path.is_file() else -1
