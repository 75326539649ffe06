"""Whose folder is gone on with, and that one live run has it; what a kill leaves is read, not stumbled over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_ds.config import DataConfig, ModelConfig, Recipe, RecipeError, RewardConfig, RunConfig, TrainConfig
from grpo_ds.run_folder import RunFolder, find_run, new_run_folder

STATE = {"round": 0, "version": 0, "cursor": 0, "optimizer_steps": 0, "world": 1, "must_match": {}, "totals": {}}


def recipe_in(folder: Path, name: str = "quickstart", resume: str | None = "auto", rounds: int = 9) -> Recipe:
    return Recipe(
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        reward=RewardConfig(functions=["f"]),
        train=TrainConfig(rounds=rounds),
        run=RunConfig(dir=str(folder), name=name),
        resume=resume,
    )


def make_run(folder: Path, rounds: int, age_s: int = 0, summary: int | None = None) -> Path:
    """A run with one checkpoint, and with a summary of so many rounds."""
    checkpoint = folder / "checkpoints" / f"round-{rounds:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.json").write_text(json.dumps(STATE | {"round": rounds}))
    stamp = checkpoint.stat().st_mtime - age_s
    os.utime(checkpoint, (stamp, stamp))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({"rounds": summary}))
    return folder


def test_auto_takes_the_newest_run_of_exactly_this_name(tmp_path: Path) -> None:
    older = make_run(tmp_path / "quickstart-20250101-000000", 2, age_s=900)
    wanted = make_run(tmp_path / "quickstart-20250102-000000.1", 3, age_s=600)
    for other in ("quickstart-lr5-20250103-000000", "quickstart-old", "quickstart-20250103-000000-copy"):
        make_run(tmp_path / other, 7)
    found = find_run(recipe_in(tmp_path))
    assert found.path == wanted and found.checkpoint == wanted / "checkpoints" / "round-000003"
    found.close()
    os.utime(older / "checkpoints" / "round-000002")
    again = find_run(recipe_in(tmp_path))
    assert again.path == older, "by the age of its last checkpoint"
    again.close()


def test_auto_finds_what_a_new_run_is_called_also_for_odd_names(tmp_path: Path) -> None:
    for name in ("a[b]", "team/run", "x+y"):
        first, second = (new_run_folder(recipe_in(tmp_path, name)) for _ in range(2))
        assert first.path != second.path
        make_run(second.path, 1)
        first.close()
        second.close()
        found = find_run(recipe_in(tmp_path, name))
        assert found.path == second.path
        found.close()


def test_without_a_run_to_go_on_with_auto_starts_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "quickstart-lr5-20250103-000000", 7)
    found = find_run(recipe_in(tmp_path / "runs"))
    assert re.fullmatch(r"quickstart-\d{8}-\d{6}", found.path.name) and found.checkpoint is None
    assert "so a new one starts" in capsys.readouterr().out


@pytest.mark.parametrize(("rounds", "summary", "goes_on"), [(9, None, True), (9, 5, True), (8, 5, True), (9, 9, False)])
def test_a_run_is_finished_when_its_summary_is_written(
    rounds: int, summary: int | None, goes_on: bool, tmp_path: Path
) -> None:
    """A summary of fewer rounds is that of the run before train.rounds was raised."""
    run = make_run(tmp_path / "quickstart-20250101-000000", rounds, summary=summary)
    if goes_on:
        found = find_run(recipe_in(tmp_path))
        assert found.path == run
        found.close()
    else:
        with pytest.raises(RecipeError, match=r"round-000009 already holds 9 rounds and train\.rounds is 9: raise"):
            find_run(recipe_in(tmp_path))
        RunFolder(run).close()  # the refused run holds nothing


def test_a_folder_belongs_to_one_live_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "quickstart-20250101-000000", 2)
    program = (
        "import pathlib, sys; from grpo_ds.run_folder import RunFolder\n"
        "held = RunFolder(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for resume in ("auto", str(run)):
            sentence = rf".*000000 belongs to a run that is alive \(process {other.pid} on \S+\): wait for its end"
            with pytest.raises(RecipeError, match=sentence):
                find_run(recipe_in(tmp_path, resume=resume))
        other.kill()
    found = find_run(recipe_in(tmp_path))
    assert found.path == run, "a killed run lets go"
    found.close()


def test_child_processes_do_not_keep_the_folder(tmp_path: Path) -> None:
    held = RunFolder(tmp_path)
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        held.close()
        RunFolder(tmp_path).close()
        child.kill()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        RecipeError, match=r"run\.dir: the file system of .* gives no locks \(flock: No locks available"
    ):
        RunFolder(tmp_path)
