"""A SLURM for each test, a project folder to submit from, and the tiny project's recipe, whose pace a test can set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Launched, run, write_project
from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.namespaces import two_namespaces
from tests.slurm.pace import PACE, Pace


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny project; its folder holds everything that it names."""
    made = write_project(tmp_path_factory.mktemp("project"))
    (made.parent / "pace.py").write_text(PACE)
    Pace(made.parent / "pace")
    made.write_text(made.read_text().replace("rewards.py:mixed", "pace.py:paced"))
    return made


@pytest.fixture
def pace(recipe: Path) -> Iterator[Pace]:
    """The recipe's pace; free again after the test."""
    made = Pace(recipe.parent / "pace")
    yield made
    made.free()


@pytest.fixture(scope="session")
def one_node(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Two rounds of the recipe on one node of two ranks."""
    arguments = ["--recipe", str(recipe), "--train.rounds", "2", "--train.checkpoint_every", "0"]
    done = run(arguments, tmp_path_factory.mktemp("one"), "deepspeed")
    assert done.process.returncode == 0, done.screen
    return done


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two idle nodes; ended with everything on them."""
    made = Cluster(tmp_path / "slurm")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces."""
    with two_namespaces() as names:
        yield names


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder to submit from: runs/ and the logs come to lie in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder
