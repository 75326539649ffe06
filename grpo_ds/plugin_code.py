"""Imports the code of a plugin: a module or a file that somebody else wrote, whose mistakes become one sentence each."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_ds.config import RecipeError

_MACHINERY = {importlib.__file__, inspect.__file__}


def import_target(label: str, module: str, attribute: str) -> Any:
    """The class or function `attribute` (dotted where it is nested) of `module`: a dotted name, or a path to a .py file.

    Raises RecipeError that starts with `label`.
    """
    with one_sentence(label, f"importing {module}"):
        target: Any = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        for part in attribute.split("."):
            if not hasattr(target, part):  # a module may import it only now, and fail at that
                near = difflib.get_close_matches(part, dir(target), n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise RecipeError(f"{label}: {module} has no attribute {attribute!r}{hint}")
            target = getattr(target, part)
    if not callable(target):
        raise RecipeError(f"{label}: {module}:{attribute} is a {type(target).__name__}, not a class or a function")
    return target


@contextmanager
def one_sentence(label: str, doing: str) -> Iterator[None]:
    """Runs code of others: whatever it raises, or an exit, becomes a RecipeError that starts with `label`.

    A RecipeError of its own passes as it is.
    """
    try:
        yield
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"{label}: {doing} failed with {type(error).__name__}: {first_line(error)}{_place(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of its message."""
    return str(error).partition("\n")[0]


def _place(error: BaseException) -> str:
    """` (file:line)` of the plugin's code that raised; nothing where the import machinery itself did."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    here = Path(__file__).parent  # the registry; built-in plugins live in folders below
    own = [f for f in frames if f.filename not in _MACHINERY and Path(f.filename).parent != here]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _load_file(path: Path) -> ModuleType:
    """Import a file once; the module's name carries its full path, so two files of one name do not collide."""
    full = path.resolve()
    name = f"grpo_ds_plugin_{full.stem}_{sha256(str(full).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
