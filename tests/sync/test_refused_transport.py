"""A transport that cannot be is refused by the command itself, before a folder is made or a model loaded."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.harness import run


def test_it_is_refused_in_one_sentence(tmp_path: Path) -> None:
    launched = run(["--recipe", "quickstart.yaml", "--run.dir", "runs", "--sync.transport", "ipc"], tmp_path)
    assert launched.process.returncode == 2, launched.screen
    assert launched.cause() == (
        "sync.transport is ipc, but the weights of this run are on cpu, not on a GPU: set it to shared_memory or auto"
    )
    assert not (tmp_path / "runs").exists()
