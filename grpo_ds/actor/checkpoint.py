"""Checkpoints: everything the loop needs to go on as if it had not stopped.

A checkpoint is DeepSpeed's own (trained weights, optimizer), `trainer.json` (round, policy version, prompt cursor,
prompts in flight, what the run must agree on, the size of each file) and `carried-<node>.jsonl` (surplus groups). It is
written under a temporary name, and renamed when the disks have it, so a folder `round-NNNNNN` is whole. Randomness needs
no file: sampling and prompt order are functions of train.seed and the round, and torch is seeded from them at each round.

Bytes at 70B: 14 B a parameter (bf16 weights, fp32 master and two moments), written by all ranks in parallel: 1.9 GB a
rank on 512 ranks, 15 GB a node. A round waits until they have left the page cache, 8 s at 2 GB/s a node; each node asks
for all files, because only it knows which of them it has written: 128 opens a rank, and 7 KB of names and sizes from
each. On several nodes run.dir must be a file system that all of them share. A checkpoint of another number of ranks is
first converted (`grpo_ds.actor.universal`).
"""

from __future__ import annotations

import json
import pickle
import shutil
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo_ds.actor.universal import UNIVERSAL, make_universal
from grpo_ds.config import RecipeError
from grpo_ds.dist import Ranks
from grpo_ds.records import read_groups, replace_folder, sync, write_groups, write_whole
from grpo_ds.types import Group

_REMOVE = "remove the folder, and the run goes on from the checkpoint before"


@dataclass(frozen=True)
class TrainerState:
    """The loop's own state after a whole number of rounds."""

    round: int
    """Rounds finished."""
    version: int
    """Policy version of the weights."""
    cursor: int
    """Prompts drawn so far."""
    optimizer_steps: int
    world: int
    """Ranks that wrote the checkpoint."""
    must_match: dict[str, Any]
    """Settings that a resumed run may not change; dotted recipe keys, and the data's fingerprint."""
    totals: dict[str, float]
    """Running sums of the summary: seconds, samples, tokens."""
    unfinished: list[int] = field(default_factory=list)
    """Prompts that were being answered, or waited for it: a resumed run asks them first (sync.mode keep, abort)."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each file beside trainer.json, as they were written."""


def checkpoints_of(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("round-??????") if (p / "trainer.json").is_file())


def save_checkpoint(
    run: Path, engine: Any, state: TrainerState, carried: list[Group] | None, ranks: Ranks, keep: int
) -> Path:
    """Writes one checkpoint from all ranks and removes all but the newest `keep`.

    carried: this node's surplus groups on ranks that lead a node, else None.
    """
    folder = run / "checkpoints"
    name = f"round-{state.round:06d}"
    partial = folder / f"{name}.partial"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier("checkpoint folder")
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
    if carried is not None:
        write_groups(partial / f"carried-{ranks.node}.jsonl", carried)
    ranks.barrier("checkpoint written")
    sizes = ranks.all_gather(_on_disk(partial, ranks), "checkpoint on disk")
    if ranks.is_main:
        whole = replace(state, files={name: size for rank in sizes for name, size in rank.items()})
        write_whole(partial / "trainer.json", json.dumps(asdict(whole), indent=1))
        replace_folder(partial, folder / name)
        for old in checkpoints_of(run)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier("checkpoint renamed")
    return folder / name


def _on_disk(partial: Path, ranks: Ranks) -> dict[str, int]:
    """Has this rank's share of the node's files written from the page cache to the disk; returns their sizes.

    A rename reaches the disk before what was renamed otherwise, and a machine that then stops leaves a newest
    checkpoint that is empty.
    """
    share = sorted(partial.iterdir())[ranks.local_rank :: ranks.local_world]
    for file in share:
        sync(file)
    return {file.name: file.stat().st_size for file in share}


def read_state(checkpoint: Path) -> TrainerState:
    """The state of a checkpoint; refuses one whose state cannot be read."""
    try:
        return TrainerState(**json.loads((checkpoint / "trainer.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{checkpoint}: the checkpoint's trainer.json cannot be read ({error}): {_REMOVE}") from None


def check_files(checkpoint: Path, state: TrainerState) -> None:
    """Refuses a checkpoint of which files are gone or shorter than they were: by a copy that was cut off, or a full disk."""
    for name, size in sorted(state.files.items()):
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise RecipeError(f"{checkpoint}: {name} has {found} of the {size} bytes that were written: {_REMOVE}")


def check_state(checkpoint: Path, state: TrainerState, must_match: dict[str, Any]) -> None:
    """Refuses to go on with what would silently be another run."""
    for key, value in must_match.items():
        if state.must_match.get(key) != value:
            raise RecipeError(
                f"{checkpoint}: {key} was {state.must_match.get(key)!r} and is {value!r} now: a resumed run keeps it; "
                "start a new run to change it"
            )


def load_checkpoint(checkpoint: Path, engine: Any, ranks: Ranks) -> list[Group]:
    """Restores weights and optimizer on all ranks; returns the carried groups that fall to this node.

    An engine configured with checkpoint.load_universal takes a checkpoint of any number of ranks. Raises RuntimeError where
    a file cannot be read, on the ranks that read it.
    """
    if engine.load_universal_checkpoint():
        make_universal(checkpoint, ranks)
    try:
        found = _load(checkpoint, engine)
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        if not _while_reading(error):
            raise
        # With its universal form only that is damaged: it is made of files that were read.
        folder = checkpoint / UNIVERSAL if engine.load_universal_checkpoint() else checkpoint
        advice = "remove the folder, and it is made again" if folder != checkpoint else _REMOVE
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RuntimeError(f"{folder}: a file of the checkpoint cannot be read ({cause}): {advice}") from error
    if not found:
        raise RecipeError(f"{checkpoint}: DeepSpeed found no weights in it: {_REMOVE}")
    if not ranks.leads_node:
        return []
    groups = [group for file in sorted(checkpoint.glob("carried-*.jsonl")) for group in read_groups(file)]
    return [group for group in groups if group.prompt.index % ranks.nodes == ranks.node]


def _load(checkpoint: Path, engine: Any) -> bool:
    """Has DeepSpeed read the checkpoint or its universal form; whether it found one."""
    if engine.load_universal_checkpoint():
        path, _ = engine.load_checkpoint(str(checkpoint), tag=UNIVERSAL)
        for state in engine.optimizer.optimizer.state.values():
            # DeepSpeed 0.19.8 gives all sub-groups one step tensor, which each of them would then count up.
            if hasattr(state.get("step"), "clone"):
                state["step"] = state["step"].clone()
    else:
        # Frozen weights are those of model.path, and not in the checkpoint.
        whole = all(param.requires_grad for param in engine.module.parameters())
        path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=whole)
    return path is not None


def _while_reading(error: BaseException) -> bool:
    """Whether torch raised it over the content of a file, and not a collective or a model that does not fit."""
    return any(frame.filename.endswith("torch/serialization.py") for frame in traceback.extract_tb(error.__traceback__))
