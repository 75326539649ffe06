"""A checkpoint has its name when the disks have its content, and one of which something is missing is not gone on with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_ds.actor.checkpoint import TrainerState, _on_disk, check_files, read_state, save_checkpoint
from grpo_ds.config import RecipeError

STATE = TrainerState(3, 3, 96, 6, 1, {}, {"seconds": 1.0})


class Writer:
    """An engine that writes two files."""

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        for name in ("model_states.pt", "optim_states.pt"):
            (Path(folder) / tag / name).write_bytes(bytes(1000))


def ranks(local_rank: int = 0, local_world: int = 1, others: dict[str, int] | None = None) -> Any:
    return SimpleNamespace(
        is_main=local_rank == 0,
        node=0,
        local_rank=local_rank,
        local_world=local_world,
        barrier=lambda what: None,
        all_gather=lambda value, what: [value, others or {}],
    )


def save(run: Path, **of: Any) -> Path:
    return save_checkpoint(run, Writer(), STATE, [], ranks(**of), keep=2)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What was synced and renamed, in order."""
    seen: list[tuple[str, Path]] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        seen.append(("rename", self))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    return seen


def test_all_files_and_both_folders_are_synced_around_the_rename(
    tmp_path: Path, events: list[tuple[str, Path]]
) -> None:
    path = save(tmp_path)
    partial = path.with_name(f"{path.name}.partial")
    at = events.index(("rename", partial))
    before, after = events[:at], events[at + 1 :]
    files = {partial / file.name for file in path.iterdir()}
    assert len(files) == 4  # DeepSpeed's two, carried-0.jsonl, trainer.json
    synced = {file for what, file in before if what == "sync"}
    # trainer.json is renamed itself, from a name under which it was synced.
    assert files - {partial / "trainer.json"} <= synced and partial / "trainer.json.partial" in synced
    assert before[-1] == ("sync", partial)
    assert ("sync", path.parent) in after


def test_the_ranks_of_a_node_share_its_files(tmp_path: Path, events: list[tuple[str, Path]]) -> None:
    names = {f"{k}.pt" for k in range(5)}
    for name in names:
        (tmp_path / name).write_bytes(bytes(10))
    shares = [_on_disk(tmp_path, ranks(local_rank, 2)) for local_rank in range(2)]
    assert not set(shares[0]) & set(shares[1])
    assert shares[0] | shares[1] == dict.fromkeys(names, 10)
    assert {file.name for _, file in events} == names


def test_the_state_names_every_file_of_all_ranks(tmp_path: Path) -> None:
    path = save(tmp_path, others={"written-elsewhere.pt": 5})
    assert read_state(path).files == {
        "model_states.pt": 1000,
        "optim_states.pt": 1000,
        "carried-0.jsonl": 0,
        "written-elsewhere.pt": 5,
    }


def cut(file: Path) -> None:
    os.truncate(file, 600)


@pytest.mark.parametrize(("damage", "bytes_left"), [(cut, 600), (Path.unlink, 0)])
def test_a_file_that_is_not_whole_is_named(damage: Callable[[Path], None], bytes_left: int, tmp_path: Path) -> None:
    path = save(tmp_path)
    check_files(path, read_state(path))
    damage(path / "optim_states.pt")
    sentence = (
        rf"{path}: optim_states\.pt has {bytes_left} of the 1000 bytes that were written: remove the folder, and the run "
        "goes on from the checkpoint before"
    )
    with pytest.raises(RecipeError, match=sentence):
        check_files(path, read_state(path))
