"""DeepSpeed's universal form of a checkpoint, which any number of ranks can read.

Made where another number of ranks asks for it, by one process of the first node that reads all of the checkpoint and
writes fp32 tensors of 12 B a parameter beside it. The process is the guard's (`grpo_ds.engine.guard`), so it ends with
the run, however that ends.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from pathlib import Path

from grpo_ds.dist import Ranks
from grpo_ds.guarded import run_guarded
from grpo_ds.records import replace_folder, sync

UNIVERSAL = "universal"
"""Folder in a checkpoint that holds its universal form."""
_PATIENCE = 0.9
"""Part of train.collective_timeout_s that the conversion may take: the other ranks wait that long for its end."""


def make_universal(checkpoint: Path, ranks: Ranks) -> None:
    """The main rank converts the checkpoint, once; all ranks learn of a failure. Raises RuntimeError."""
    problem = None
    if ranks.is_main and not (checkpoint / UNIVERSAL).is_dir():
        problem = convert(checkpoint, ranks.timeout_s)
    problem = ranks.broadcast(problem, "conversion of the checkpoint")
    if problem:
        raise RuntimeError(f"{checkpoint} could not be converted for {ranks.world} ranks: {problem}")


def convert(checkpoint: Path, timeout_s: float) -> str | None:
    """Runs DeepSpeed's converter in a process of its own; returns what went wrong.

    timeout_s: of the collective in which the other ranks wait.
    """
    for left in checkpoint.glob(f"{UNIVERSAL}.*.partial"):  # of a run that was killed below
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: what such a run has started may still be ending.
    partial = checkpoint / f"{UNIVERSAL}.{uuid.uuid4().hex[:8]}.partial"
    log = checkpoint.parents[1] / "logs" / "universal.log"
    log.parent.mkdir(exist_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    limit = _PATIENCE * timeout_s
    code = run_guarded(_command(checkpoint, partial), log, limit)
    if code is None:
        return (
            f"DeepSpeed's ds_to_universal did not end within {limit:g} s ({_PATIENCE:g} of the {timeout_s:g} s of "
            "train.collective_timeout_s)"
        )
    if code != 0:
        said = log.read_bytes()[begin:].decode(errors="replace")
        return f"DeepSpeed's ds_to_universal failed: {said.strip()[-500:]}"
    for file in partial.rglob("*"):
        sync(file)
    replace_folder(partial, checkpoint / UNIVERSAL)
    return None


def _command(checkpoint: Path, output: Path) -> list[str]:
    workers = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    return [*command, "--input_folder", str(checkpoint), "--output_folder", str(output)]
