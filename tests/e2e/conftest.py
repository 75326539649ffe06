"""One tiny project, and the whole runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import Launched, run, write_project


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny project; its folder holds everything that it names."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def whole_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Five rounds on two ranks, uninterrupted."""
    done = run(["--recipe", str(recipe)], tmp_path_factory.mktemp("whole"), "deepspeed")
    assert done.process.returncode == 0, done.screen
    return done


@pytest.fixture(scope="session")
def one_rank_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """One round on one rank with the smallest micro-batches that hold a sequence."""
    arguments = ["--recipe", str(recipe), "--train.rounds", "1", "--train.micro_batch_tokens", "14"]
    done = run(arguments, tmp_path_factory.mktemp("one_rank"), "python")
    assert done.process.returncode == 0, done.screen
    return done
