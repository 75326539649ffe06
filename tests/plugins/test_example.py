"""Packages that pip installed work like built-ins: listed, documented, checked, chosen by a recipe.

One is the example of this folder, the other is written out of the docstring that shows authors a whole package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from grpo_ds import conformance
from grpo_ds.build import build_estimator
from grpo_ds.cli import main
from grpo_ds.config import RecipeError
from grpo_ds.recipe import read_recipe

HERE = Path(__file__).parent
TORCH_FREE = """
import sys
from grpo_ds.rewards.resolve import resolve
print(resolve("digits_right", [])(completions=["13", "7"], answer=["14", 7]), "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the docstring, as files: a name that stands alone, then the indented text of that file."""
    folder = tmp_path_factory.mktemp("documented") / "midrange"
    folder.mkdir()
    pieces = re.split(r"^    (\w+\.\w+)\n", str(conformance.__doc__), flags=re.MULTILINE)[1:]
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        lines = [line for line in text.splitlines() if line.startswith(" " * 8) or not line]
        (folder / name).write_text(textwrap.dedent("\n".join(lines)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "midrange.py",
        "pyproject.toml",
        "setup.cfg",
        "test_midrange.py",
    ]
    return folder


@pytest.fixture(scope="module")
def site(pip_install: Callable[..., Path], documented: Path) -> Path:
    return pip_install(HERE / "example_estimator", documented)


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(site))
    yield
    for name in ("example_estimator", "midrange"):
        sys.modules.pop(name, None)


def outside(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder of its own, with the packages installed."""
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=200, env=env, cwd=cwd)


@pytest.mark.parametrize(
    ("head", "needs"), [("midpoint  [example-estimator 1.0]", ["min_group_size 2"]), ("midrange  [midrange 1.0]", [])]
)
def test_it_is_listed_with_its_distribution_needs_and_documented_options(
    installed: None, head: str, needs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "estimators"]) == 0
    lines = capsys.readouterr().out.partition(f"\n  {head}\n")[2].splitlines()
    assert lines[0].startswith("      A_i = scale * (R_i - ")
    assert lines[1 : 1 + len(needs)] == [f"      needs: {need}" for need in needs]
    assert lines[1 + len(needs)] == "      scale: float (default 1.0)  Factor on every advantage."


@pytest.mark.parametrize("name", ["midpoint", "midrange"])
def test_it_passes_the_conformance_kit(installed: None, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check-estimator", name, "--option", "scale=0.5"])
    assert (code, capsys.readouterr().out.splitlines()[-1]) == (0, f"{name}: all hold")


def test_the_suite_of_its_author_has_one_test_a_property(site: Path, documented: Path, tmp_path: Path) -> None:
    absent = tmp_path / "test_absent.py"
    absent.write_text((documented / "test_midrange.py").read_text().replace('"midrange"', '"midrnge"'))
    suites = [HERE / "example_estimator" / "test_example_estimator.py", documented / "test_midrange.py", absent]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", str(tmp_path), "-c", os.devnull]
    done = outside(site, tmp_path, "-m", "pytest", *options, *map(str, suites))
    properties = len(conformance.PROPERTIES)
    assert f"{properties} failed, {2 * properties} passed" in done.stdout, done.stdout + done.stderr
    assert "no estimator is called 'midrnge', did you mean 'midrange'?" in done.stdout


@pytest.mark.parametrize("name", ["midpoint", "midrange"])
def test_a_recipe_chooses_it_and_its_options_take_effect(installed: None, name: str) -> None:
    arguments = ["--recipe", "quickstart", "--algorithm.adv_estimator", name]
    estimator, _ = build_estimator(read_recipe([*arguments, "--algorithm.estimator_args.scale=0.5"])[0])
    advantages, _ = estimator(torch.tensor([[1.0], [5.0]]), torch.ones(2, 1), torch.tensor([0, 0]))
    assert advantages.tolist() == [[-1.0], [1.0]]
    with pytest.raises(RecipeError, match=rf"{name}' from .* 1.0 has no option 'sclae', did you mean 'scale'\?"):
        build_estimator(read_recipe([*arguments, "--algorithm.estimator_args.sclae=0.5"])[0])


def test_its_reward_is_found_by_name_without_torch(site: Path, tmp_path: Path) -> None:
    assert outside(site, tmp_path, "-c", TORCH_FREE).stdout == "[0.5, 1.0] False\n"


@pytest.mark.parametrize("command", ["check-estimator", "plugins"])
def test_the_help_says_where_a_whole_package_is_shown(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "python -m pydoc grpo_ds.conformance" in " ".join(capsys.readouterr().out.split())
