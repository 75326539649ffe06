"""Plugins that are broken in every way we know, in real installed distributions: each is refused in one sentence."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from grpo_ds import __version__
from grpo_ds.build import build_estimator
from grpo_ds.config import RecipeError
from grpo_ds.plugins import list_plugins
from grpo_ds.recipe import read_recipe

OWN = "broken-plugins 0.9"


@pytest.fixture(scope="module")
def site(pip_install: Callable[..., Path]) -> Path:
    """Both distributions; one module was removed by hand, and one distribution's entry point by an upgrade."""
    folder = pip_install("broken", "usurper")
    (folder / "broken_vanishing.py").unlink()
    (listing,) = folder.glob("usurper-*.dist-info/entry_points.txt")
    listing.write_text("".join(line for line in listing.read_text().splitlines(True) if "leaving" not in line))
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.rmtree(site / "__pycache__", ignore_errors=True)  # it would keep the removed module alive
    monkeypatch.syspath_prepend(str(site))
    yield site
    for name in [name for name in sys.modules if name.startswith(("broken_", "usurper"))]:
        del sys.modules[name]


@dataclass(frozen=True)
class Broken:
    kind: str
    name: str
    message: str
    source: str = OWN
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    Broken("missing module", "missing_module", "importing broken_absent failed with ModuleNotFoundError"),
    Broken(
        "import error",
        "import_error",
        "importing broken_import failed with RuntimeError: the extension was built for another version (",
    ),
    Broken(
        "missing attribute",
        "missing_attribute",
        "broken_plugins has no attribute 'Estimater', did you mean 'Estimator'?",
    ),
    Broken(
        "wrong signature",
        "wrong_signature",
        "cannot be called with (token_rewards, response_mask, group_index): too many positional arguments",
    ),
    Broken(
        "unknown option",
        "picky",
        "has no option 'alhpa', did you mean 'alpha'? (it takes: alpha)",
        options={"alhpa": 1},
    ),
    Broken("wrong type", "picky", "option 'alpha' is 'x' (str), it must be float", options={"alpha": "x"}),
    Broken("a built-in's name", "grpo", f"estimator 'grpo' is offered by grpo_ds {__version__} (built in), {OWN}"),
    Broken("two distributions", "contested", "uninstall all but one", source=f"{OWN}, usurper 2.1"),
    Broken("vanished module", "vanishing", "importing broken_vanishing failed with ModuleNotFoundError"),
    Broken("vanished entry point", "leaving", "no estimator is called 'leaving'", source=f"{OWN}, usurper 2.1"),
    Broken("no function", "not_callable", "broken_plugins:SETTINGS is a dict, not a class or a function"),
    Broken("no __call__", "instance_not_callable", "instances of broken_plugins:Silent cannot be called"),
    Broken("need it cannot take", "deaf", "cannot be called with (token_rewards, response_mask, group_index, greedy_"),
    Broken(
        "need it does not declare", "forgetful", "takes all_reduce but does not declare whole_batch, so the trainer"
    ),
    Broken("need of a wrong type", "vague", "its need min_group_size is 'yes', not a int", options={"beta": 1}),
    Broken(
        "constructor raises",
        "eager",
        "making broken_plugins:Eager from its options failed with RuntimeError: no accelerator was found (",
    ),
    Broken("unmet need", "hungry", "needs at least 64 of them: rollout.n is 8"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind.replace(" ", "-"))
def test_a_recipe_with_a_broken_plugin_is_refused_in_one_sentence_that_names_its_distribution(
    installed: Path, case: Broken
) -> None:
    recipe, _ = read_recipe(
        ["--recipe", "quickstart", "--algorithm.adv_estimator", case.name]
        + [f"--algorithm.estimator_args.{key}={value}" for key, value in case.options.items()]
    )
    with pytest.raises(RecipeError) as caught:
        build_estimator(recipe)
    message = str(caught.value)
    assert case.message in message
    assert case.source in message
    assert repr(case.name) in message
    assert "\n" not in message


def test_the_list_shows_each_broken_plugin_with_its_sentence(installed: Path) -> None:
    rows = {row.name: row for row in list_plugins("grpo_ds.estimators")}
    fine = {"picky", "hungry", "rloo"}
    assert all(rows[name].problem is None for name in fine)
    for case in CASES:
        if case.name not in fine | {"leaving"}:
            row = rows[case.name]
            assert case.message in (row.problem or "") and OWN in row.source


def test_the_trainers_help_gives_each_broken_plugin_its_sentence_and_goes_on(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_recipe(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for case in CASES:
        if case.name not in ("picky", "hungry", "leaving"):
            assert case.message in text
    assert "      alpha: float (default 0.5)  A number.\n" in text.partition("  picky  [broken-plugins 0.9]\n")[2]
    assert "grpo_ds.rewards (" in text.partition("grpo_ds.filters (")[2], "the groups after the broken one"


def test_when_the_distributions_are_gone_so_are_their_plugins() -> None:
    names = {row.name for row in list_plugins("grpo_ds.estimators")}
    assert "picky" not in names and "grpo" in names
