"""Folders for temporary files of servers: what killed runs left is removed, what live ones use is not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from grpo_ds.engine.scratch import Scratch, sweep

OWNER = "from grpo_ds.engine.scratch import Scratch\nheld = Scratch()\nprint(held.path, flush=True)\ninput()"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # the answer of an earlier question


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    stranger = tmp_path / "grpo-ds-12345678"  # one that is being made has no lock yet
    stranger.mkdir()
    mine = Scratch()
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().decode().strip())
        assert theirs.parent == tmp_path
        (theirs / "socket").touch()
        sweep()
        assert theirs.exists() and mine.path.exists(), "both owners live"
        owner.kill()
    assert theirs.exists(), "nobody is left who could remove it"
    later = Scratch()
    assert not theirs.exists()
    assert mine.path.exists() and stranger.exists()
    mine.remove()
    later.remove()
    later.remove()
    assert list(tmp_path.iterdir()) == [stranger]


def test_a_child_process_does_not_keep_the_folder(tmp_path: Path) -> None:
    scratch = Scratch()
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        scratch._lock.close()  # as the end of this process would
        sweep()
        assert not scratch.path.exists()
        child.kill()
