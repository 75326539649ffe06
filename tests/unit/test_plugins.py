"""Plugins of others: found, checked, and refused in one sentence that names plugin and distribution."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from grpo_ds import __version__
from grpo_ds.config import RecipeError
from grpo_ds.estimators import get_estimator
from grpo_ds.plugin_options import matches
from grpo_ds.plugins import Need, Registry, list_plugins, located, registry

GROUP = "grpo_ds_tests.plugins"
GOOD = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

T = TypeVar("T")

@dataclass(frozen=True, kw_only=True)
class Scale:
    by: float = 2.0
    \"\"\"What to multiply with.\"\"\"
    kind: Literal["a", "b"] = "a"
    names: list[str] | None = None
    hungry: ClassVar[bool] = True

    def __call__(self, x: Tensor, *, extra=None):
        return x * self.by

def shift(x: Tensor, *, by: int = 1, extra=None):
    return x + by

shift.hungry = True

def undeclared(x, *, extra=None):
    return x

class Two:
    def __call__(self, x, y):
        return x

class Deaf:
    hungry = True
    def __call__(self, x):
        return x

class NotCallable:
    pass

class WrongNeed:
    hungry = "yes"
    def __call__(self, x):
        return x

class NeedsOnly(WrongNeed):
    def __init__(self, *, size: int) -> None:
        pass

class Crashes:
    def __init__(self, *, error: str = "RuntimeError"):
        raise {"RuntimeError": RuntimeError, "ImportError": ImportError, "SystemExit": SystemExit}[error]("no GPU\\nhere")
    def __call__(self, x):
        return x

class Lazy:
    @property
    def hungry(self):
        raise OSError("not now")
    def __call__(self, x):
        return x

class Native(int):
    __signature__ = 5
    def __call__(self, x):
        return x

class OddHint:
    def __init__(self, *, size: T = 3):
        pass
    def __call__(self, x):
        return x

class Refuses:
    def __init__(self, *, size: int = 3) -> None:
        if size < 3:
            raise ValueError(f"size is {size}, it must be at least 3")
    def __call__(self, x):
        return x

class Unresolvable:
    def __init__(self, *, size: Elsewhere = 3) -> None:
        pass
    def __call__(self, x):
        return x

class Required:
    def __init__(self, *, size: int) -> None:
        pass
    def __call__(self, x):
        return x

NUMBER = 5
"""
Install = Callable[..., None]


@pytest.fixture
def plugins() -> Registry:
    made = Registry(GROUP, "gadget", ("x",), needs={"hungry": Need(False, keyword="extra")}, keywords=("extra",))

    @made.register("plain")
    @dataclass(frozen=True, kw_only=True)
    class Plain:
        factor: float = 1.0
        hungry: ClassVar[bool] = False

        def __call__(self, x: Any) -> Any:
            return x * self.factor

    return made


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one module and some entry points on the import path."""
    count = iter(range(100))

    def add(distribution: str, version: str, source: str, entry_points: dict[str, str]) -> None:
        root = tmp_path / f"site{next(count)}"
        info = root / f"{distribution}-{version}.dist-info"
        info.mkdir(parents=True)
        (root / f"{distribution}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        monkeypatch.syspath_prepend(str(root))

    return add


def refused(plugins: Registry, name: str, /, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        plugins.build(name, options)
    return str(caught.value)


def test_a_built_in_takes_its_options(plugins: Registry) -> None:
    assert plugins.build("plain", {"factor": 3})(2) == 6


def test_registering_a_name_twice_raises(plugins: Registry) -> None:
    with pytest.raises(ValueError, match="gadget 'plain' is registered already"):
        plugins.register("plain")(int)


def test_an_unknown_name_lists_what_exists_and_the_nearest(plugins: Registry, install: Install) -> None:
    install("pkg_unknown", "1.0", GOOD, {"scale": "pkg_unknown:Scale"})
    message = refused(plugins, "scael")
    assert "no gadget is called 'scael', did you mean 'scale'?" in message and "there are: plain, scale" in message


def test_entry_point_dotted_path_and_file_find_the_same(plugins: Registry, install: Install, tmp_path: Path) -> None:
    install("pkg_ways", "1.0", GOOD, {"scale": "pkg_ways:Scale"})
    (tmp_path / "mine.py").write_text(GOOD)
    for name in ("scale", "pkg_ways.Scale", f"{tmp_path}/mine.py:Scale"):
        assert plugins.build(name, {"by": 5})(2) == 10
        assert plugins.needs(name) == {"hungry": True}


def test_a_function_takes_its_keyword_only_parameters_as_options(plugins: Registry, install: Install) -> None:
    install("pkg_function", "1.0", GOOD, {"shift": "pkg_function:shift"})
    assert plugins.build("shift", {"by": 4})(2) == 6
    assert [option.name for option in plugins.options("shift")] == ["by"]
    assert "has no option 'extra'" in refused(plugins, "shift", extra=1)


def test_a_file_is_imported_once(plugins: Registry, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "once.py").write_text(GOOD + f"open({str(log)!r}, 'a').write('x')\n")
    for _ in range(2):
        plugins.build(f"{tmp_path}/once.py:Scale")
    assert log.read_text() == "x"


def test_two_distributions_with_one_name_are_a_clash(plugins: Registry, install: Install) -> None:
    install("pkg_first", "1.0", GOOD, {"scale": "pkg_first:Scale"})
    install("pkg_second", "2.5", GOOD, {"scale": "pkg_second:Scale"})
    message = refused(plugins, "scale")
    assert "gadget 'scale' is offered by" in message and "pkg_first 1.0" in message and "pkg_second 2.5" in message


def test_an_entry_point_cannot_replace_a_built_in(plugins: Registry, install: Install) -> None:
    install("pkg_usurper", "1.0", GOOD, {"plain": "pkg_usurper:Scale"})
    message = refused(plugins, "plain")
    assert f"grpo_ds {__version__} (built in)" in message and "pkg_usurper 1.0" in message
    assert plugins.build("pkg_usurper.Scale")(1) == 2, "the message's way out works"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("pkg_bad:Scael", "pkg_bad has no attribute 'Scael', did you mean 'Scale'?"),
        ("pkg_bad:NUMBER", "pkg_bad:NUMBER is a int, not a class or a function"),
        ("pkg_bad:NotCallable", "cannot be called"),
        ("pkg_bad:Two", "cannot be called with (x): missing a required argument: 'y'"),
        ("pkg_bad:Deaf", "cannot be called with (x, extra=...)"),
        (
            "pkg_bad:undeclared",
            "takes extra but does not declare hungry, so the trainer would never pass it: set hungry",
        ),
        ("pkg_bad:Crashes", "making pkg_bad:Crashes from its options failed with RuntimeError: no GPU (/"),
        ("pkg_bad:Lazy", "reading its needs and signature failed with OSError: not now (/"),
        ("pkg_bad:Native", "reading its options failed with TypeError"),
        ("pkg_bad:WrongNeed", "its need hungry is 'yes', not a bool"),
        ("pkg_bad:Unresolvable", "the annotation 'Elsewhere' of its option 'size' cannot be resolved"),
        ("pkg_bad:Required", "needs its option 'size' (int)"),
        ("pkg_bad_missing:Scale", "importing pkg_bad_missing failed with ModuleNotFoundError"),
    ],
)
def test_each_mistake_of_a_plugin_is_one_sentence(
    plugins: Registry, install: Install, target: str, message: str
) -> None:
    install("pkg_bad", "0.3", GOOD, {"bad": target})
    text = refused(plugins, "bad")
    assert text.startswith("gadget 'bad' from pkg_bad 0.3") and message in text and "\n" not in text


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError", "SystemExit"])
def test_whatever_a_constructor_raises_is_one_sentence(plugins: Registry, install: Install, error: str) -> None:
    install("pkg_crashes", "0.3", GOOD, {"bad": "pkg_crashes:Crashes"})
    text = refused(plugins, "bad", error=error)
    assert text.startswith(
        "gadget 'bad' from pkg_crashes 0.3: making pkg_crashes:Crashes from its options failed with "
    )
    assert f"{error}: no GPU (" in text and "pkg_crashes.py:" in text and "\n" not in text


def test_an_annotation_that_no_value_can_be_checked_against_is_one_sentence(
    plugins: Registry, install: Install
) -> None:
    install("pkg_odd", "0.3", GOOD, {"bad": "pkg_odd:OddHint"})
    assert "gadget 'bad' from pkg_odd 0.3: checking its options failed with TypeError" in refused(
        plugins, "bad", size=2
    )


def test_a_module_that_imports_its_parts_only_when_asked_may_fail_then(plugins: Registry, install: Install) -> None:
    source = "def __getattr__(name):\n    raise ImportError(f'{name} needs a library')\n"
    install("pkg_late", "0.3", source, {"bad": "pkg_late:Scale"})
    text = refused(plugins, "bad")
    assert "from pkg_late 0.3: importing pkg_late failed with ImportError: Scale needs a library (" in text


def test_a_broken_plugin_costs_its_own_row_of_the_list_and_no_other(plugins: Registry, install: Install) -> None:
    broken = ["Crashes", "NeedsOnly", "Lazy", "Native", "WrongNeed", "Unresolvable", "undeclared"]
    install("pkg_rows", "0.3", GOOD, {name.lower(): f"pkg_rows:{name}" for name in [*broken, "Scale", "Required"]})
    rows = {row.name: row for row in list_plugins(GROUP)}
    for name in broken:
        text = rows[name.lower()].problem or ""
        assert text.startswith(f"gadget '{name.lower()}' from pkg_rows 0.3") and "\n" not in text
    assert all(rows[name].problem is None for name in ("plain", "scale", "required"))


def test_an_error_while_importing_is_reported_with_its_type(plugins: Registry, install: Install) -> None:
    install("pkg_raises", "0.3", "raise KeyError('no key')", {"bad": "pkg_raises:Scale"})
    assert "gadget 'bad' from pkg_raises 0.3: importing pkg_raises failed with KeyError" in refused(plugins, "bad")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bye": 1}, "has no option 'bye', did you mean 'by'? (it takes: by, kind, names)"),
        ({"by": "3"}, "option 'by' is '3' (str), it must be float"),
        ({"by": True}, "option 'by' is True (bool), it must be float"),
        ({"kind": "c"}, "option 'kind' is 'c' (str), it must be Literal['a', 'b']"),
        ({"names": [1]}, "option 'names' is [1] (list), it must be list[str] | None"),
    ],
)
def test_wrong_options_are_refused(plugins: Registry, install: Install, options: dict[str, Any], message: str) -> None:
    install("pkg_options", "1.0", GOOD, {"scale": "pkg_options:Scale"})
    text = refused(plugins, "scale", **options)
    assert text.startswith("gadget 'scale' from pkg_options 1.0") and message in text


def test_a_plugin_that_refuses_its_options_is_quoted(plugins: Registry, install: Install) -> None:
    install("pkg_refuses", "1.0", GOOD, {"refuses": "pkg_refuses:Refuses"})
    message = "gadget 'refuses' from pkg_refuses 1.0 refuses its options: size is 1, it must be at least 3"
    assert refused(plugins, "refuses", size=1) == message


def test_a_missing_file_is_named(plugins: Registry, tmp_path: Path) -> None:
    assert re.search("plugin file .*gone.py does not exist", refused(plugins, f"{tmp_path}/gone.py:Scale"))


def test_a_file_is_looked_up_in_each_folder_in_order(plugins: Registry, tmp_path: Path) -> None:
    for place, by in (("first", 1), ("second", 3)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "near.py").write_text(f"def scale(x):\n    return x * {by}\n")
    (tmp_path / "second" / "far.py").write_text("def scale(x):\n    return x * 7\n")
    bases = [tmp_path / "first", tmp_path / "second"]
    assert plugins.build("near.py:scale", bases=bases)(2) == 2
    assert plugins.build("far.py:scale", bases=bases)(2) == 14
    assert located("far.py:scale", bases) == f"{tmp_path}/second/far.py:scale"
    assert located("plain", bases) == "plain" and located("package.module.Name", bases) == "package.module.Name"
    message = rf"plugin file gone.py does not exist \(looked for {tmp_path}/first/gone.py, {tmp_path}/second/gone.py\)"
    with pytest.raises(RecipeError, match=message):
        plugins.build("gone.py:scale", bases=bases)


def test_the_list_shows_source_needs_and_documented_options(plugins: Registry, install: Install) -> None:
    install("pkg_listed", "1.2", GOOD, {"scale": "pkg_listed:Scale", "broken": "pkg_listed:Gone"})
    rows = {row.name: row for row in list_plugins(GROUP)}
    assert sorted(rows) == ["broken", "plain", "scale"]
    scale, broken = rows["scale"], rows["broken"]
    assert (scale.source, scale.module, scale.needs) == ("pkg_listed 1.2", "pkg_listed:Scale", {"hungry": True})
    by, kind, names = scale.options
    assert (by.name, by.type, by.default, by.doc) == ("by", "float", 2.0, "What to multiply with.")
    assert (kind.type, kind.doc, names.default) == ("Literal['a', 'b']", "", None)
    assert broken.source == "pkg_listed 1.2" and "has no attribute 'Gone'" in (broken.problem or "")
    assert rows["plain"].source == f"grpo_ds {__version__}" and rows["plain"].problem is None


@pytest.mark.parametrize("group", ["grpo_ds.estimators", "grpo_ds.losses", "grpo_ds.filters", "grpo_ds.rewards"])
def test_every_built_in_works_and_documents_its_options(group: str) -> None:
    rows = list_plugins(group)
    assert rows
    for row in rows:
        assert row.problem is None
        assert all(option.doc and not option.required for option in row.options), row.name


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(RecipeError, match="no plugin group is called 'grpo_ds.gadgets'"):
        registry("grpo_ds.gadgets")


def test_an_estimator_in_a_file_needs_only_a_function(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text(
        "def half(token_rewards, response_mask, group_index, greedy_rewards=None, *, by: float = 0.5):\n"
        "    return token_rewards * by, token_rewards\n"
    )
    assert get_estimator(f"{path}:half", by=0.25)(8.0, None, None)[0] == 2.0
    with pytest.raises(RecipeError, match="option 'by' is 'x'"):
        get_estimator(f"{path}:half", by="x")


def test_values_are_matched_with_annotations() -> None:
    fits = [(1, int), (1, float), (None, int | None), ({"a": 1}, dict[str, int]), ([1, 2], tuple[int, ...]), (1, Any)]
    misfits = [(True, int), (1.5, int), ({"a": "b"}, dict[str, int]), ([1, 2], tuple[int]), ("ab", list[str])]
    assert all(matches(value, hint) for value, hint in fits)
    assert not any(matches(value, hint) for value, hint in misfits)
