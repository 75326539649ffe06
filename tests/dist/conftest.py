"""One launch of real ranks for each world size; the tests look at its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import cases
from tests.dist.harness import launch
from tests.dist.oracle import Truth


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and samples that all ranks read."""
    path = tmp_path_factory.mktemp("ranks")
    cases.make_inputs(path)
    return path


@pytest.fixture(scope="session")
def samples(folder: Path) -> list[dict[str, torch.Tensor]]:
    return cases.read_samples(folder)


@pytest.fixture(scope="session")
def truth(folder: Path) -> Truth:
    """The gradients in float64."""
    return Truth(folder, torch.float64)


@pytest.fixture(scope="session")
def world_1(folder: Path) -> list[Any]:
    return launch("tests.dist.workers:main", 1, folder)


@pytest.fixture(scope="session")
def world_2(folder: Path) -> list[Any]:
    return launch("tests.dist.workers:main", 2, folder)


@pytest.fixture(scope="session")
def resumed(world_2: list[Any], folder: Path) -> list[Any]:
    """New processes that go on from the checkpoints of `world_2`."""
    return launch("tests.dist.workers:resume", 2, folder)


@pytest.fixture(scope="session")
def world_4(folder: Path) -> list[Any]:
    """Four ranks as two nodes of two."""
    return launch("tests.dist.workers:main", 4, folder, local_world=2)


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    """Each rank's results for the world size given by indirect parametrisation."""
    results: list[Any] = request.getfixturevalue(f"world_{request.param}")
    return results
