"""Packages of this folder, really installed into a folder of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

collect_ignore_glob = ["*/*.py"]
"""The packages are installed by the tests, not imported from here; some of them break on purpose."""

HERE = Path(__file__).parent
Install = Callable[..., Path]


@pytest.fixture(scope="session")
def pip_install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """`pip_install("example_estimator", ...)` -> the folder that pip installed these packages into.

    A package is a folder of this one, or any path.
    """

    def install(*packages: str | Path) -> Path:
        sources = tmp_path_factory.mktemp("sources")
        target = tmp_path_factory.mktemp("site")
        for name in packages:  # copied, because a build leaves files beside the source
            shutil.copytree(
                HERE / name, sources / Path(name).name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [
            "--no-build-isolation",
            "--no-index",
            "--target",
            str(target),
            *(str(sources / Path(name).name) for name in packages),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return target

    return install
