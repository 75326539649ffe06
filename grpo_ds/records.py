"""Groups as JSON lines: carried over in checkpoints, and written out for people; and files that are never half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_ds.seeds import derive_seed
from grpo_ds.types import Group, Prompt, Rollout, Scored, VersionSpan


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there with all of its text, or as it was before, whenever the process is killed."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, have left the page cache for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(partial: Path, folder: Path) -> None:
    """Gives a folder its name; one that had it is removed afterwards, so that a whole one is there at any time but for
    the moment between two renames. What is in its files is the caller's to `sync`."""
    sync(partial)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed below
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def group_to_json(group: Group) -> dict[str, Any]:
    """A JSON-able form from which `group_from_json` makes an equal group."""
    return asdict(group)


def group_from_json(data: dict[str, Any]) -> Group:
    """The inverse of `group_to_json`."""
    prompt = Prompt(**{**data["prompt"], "token_ids": tuple(data["prompt"]["token_ids"])})
    baseline = _scored(data["baseline"]) if data["baseline"] else None
    return Group(prompt, tuple(_scored(member) for member in data["members"]), baseline)


def _scored(data: dict[str, Any]) -> Scored:
    raw = data["rollout"]
    rollout = Rollout(
        token_ids=tuple(raw["token_ids"]),
        logprobs=tuple(raw["logprobs"]),
        finish_reason=raw["finish_reason"],
        spans=tuple(VersionSpan(**span) for span in raw["spans"]),
        text=raw["text"],
    )
    return Scored(rollout, data["score"], data["reward"], data["parts"], data["failed"])


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    """One group a line."""
    path.write_text("".join(json.dumps(group_to_json(group)) + "\n" for group in groups))


def read_groups(path: Path) -> list[Group]:
    """The groups of `write_groups`."""
    return [group_from_json(json.loads(line)) for line in path.read_text().splitlines()]


def chosen(groups: Iterable[Group], responses: int, *key: int | str) -> list[Group]:
    """Whole groups with about `responses` responses together, in prompt order; at least one group unless it is 0.

    Which ones depends on `key` and the prompts alone, not on the order in which the engine finished them: the first to be
    finished are the short ones.
    """
    taken: list[Group] = []
    for group in sorted(groups, key=lambda g: derive_seed(*key, g.prompt.index)):
        if responses <= 0:
            break
        taken.append(group)
        responses -= len(group.members)
    return sorted(taken, key=lambda g: g.prompt.index)


def readable(group: Group, round_index: int) -> Iterable[dict[str, Any]]:
    """One flat record a response: what a person or a data frame wants to see of a rollout."""
    for k, member in enumerate(group.members):
        yield {
            "round": round_index,
            "prompt_index": group.prompt.index,
            "row": group.prompt.row,
            "sample": k,
            "prompt": group.prompt.text,
            "response": member.rollout.text,
            "score": member.score,
            "reward": member.reward,
            "rewards": member.parts,
            "finish_reason": member.rollout.finish_reason,
            "tokens": len(member.rollout.token_ids),
            "versions": [[s.version, s.start, s.end] for s in member.rollout.spans],
        }
