"""The options of a plugin: read from its annotations, checked against what a recipe gives."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from grpo_ds.config import RecipeError


@dataclass(frozen=True)
class Option:
    """One option of a plugin."""

    name: str
    hint: Any
    """The resolved annotation; Any where there is none."""
    default: Any
    """`inspect.Parameter.empty` where it must be given."""
    doc: str
    """The docstring under the field; empty where there is none."""

    @property
    def type(self) -> str:
        """The annotation as text."""
        return self.hint.__name__ if inspect.isclass(self.hint) else str(self.hint).replace("typing.", "")

    @property
    def required(self) -> bool:
        """It has no default."""
        return self.default is inspect.Parameter.empty


def read_options(label: str, target: Any, *, reserved: tuple[str, ...] = ()) -> tuple[Option, ...]:
    """A class' parameters, or a function's keyword-only ones, except those of the names `reserved`."""
    docs = _field_docs(target)
    options = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in reserved:
            continue
        if not inspect.isclass(target) and parameter.kind != parameter.KEYWORD_ONLY:
            continue
        hint = _resolve(label, target, parameter)
        options.append(Option(parameter.name, hint, parameter.default, docs.get(parameter.name, "")))
    return tuple(options)


def check_options(label: str, known: tuple[Option, ...], given: Mapping[str, Any]) -> None:
    """Refuse unknown names, missing ones and values of the wrong type."""
    by_name = {option.name: option for option in known}
    for name, value in given.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{label} has no option {name!r}{hint} (it takes: {', '.join(by_name) or 'none'})")
        if not matches(value, by_name[name].hint):
            raise RecipeError(
                f"{label}: option {name!r} is {value!r} ({type(value).__name__}), it must be {by_name[name].type}"
            )
    for option in known:
        if option.required and option.name not in given:
            raise RecipeError(f"{label} needs its option {option.name!r} ({option.type}): give it")


def matches(value: Any, hint: Any) -> bool:
    """Whether a value out of a YAML file fits an annotation; an int fits float, a bool fits neither.

    >>> matches(1, float), matches(True, float), matches([1, 2.5], list[float]), matches("a", Literal["b"])
    (True, False, True, False)
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return any(matches(value, choice) for choice in args)
    if origin is tuple:
        items = args[:1] * len(value) if len(args) == 2 and args[1] is ... else args
        return isinstance(value, tuple | list) and len(value) == len(items) and all(map(matches, value, items))
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            matches(key, args[0]) and matches(item, args[1]) for key, item in value.items()
        )
    if origin is not None:  # list[x], Sequence[x], ...
        return isinstance(value, list | tuple) and all(matches(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _resolve(label: str, target: Any, parameter: inspect.Parameter) -> Any:
    """The annotation of one parameter; only the options are resolved, the tensors of a call need not be importable."""
    hint = parameter.annotation
    if hint is parameter.empty:
        return Any
    if not isinstance(hint, str):
        return hint
    owner = target
    if inspect.isclass(target):  # an inherited field was written in its own module
        owners = (base for base in target.__mro__ if parameter.name in inspect.get_annotations(base))
        owner = next(owners, target)
    try:
        return eval(hint, vars(sys.modules[owner.__module__]))  # the plugin's own code, imported already
    except Exception as error:
        raise RecipeError(
            f"{label}: the annotation {hint!r} of its option {parameter.name!r} cannot be resolved ({error})"
        ) from error


def _field_docs(target: Any) -> dict[str, str]:
    """The string under each annotated field of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(getattr(target, "__mro__", ())):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # built-in classes, or source not at hand: no docs
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[field.target.id] = inspect.cleandoc(str(text.value.value))
    return docs
