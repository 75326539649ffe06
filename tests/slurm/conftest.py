"""One SLURM for all tests of a module, a project folder to submit from, and the tiny project's recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import write_project
from tests.slurm.cluster import ROOT, Cluster


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny project; its folder holds everything that it names."""
    return write_project(tmp_path_factory.mktemp("project"))


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
def home(tmp_path: Path) -> Path:
    """A folder to submit from: runs/ and the logs come to lie in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder
