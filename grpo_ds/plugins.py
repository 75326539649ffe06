"""Plugins: a dict and a decorator for what the project brings, entry points and paths for what others bring.

A plugin is a class whose keyword options are typed (a frozen dataclass with a docstring under each field is best) and
whose instances are called by the trainer; or a plain function, whose keyword-only parameters are the options. Four ways
to name one in a recipe: a built-in's name, an entry point's name, `package.module.Name`, `path/file.py:Name` (relative
to given folders: the working directory, then the recipe's own). Every mistake is a RecipeError that names the plugin
and the distribution it came from. A whole package is shown in `grpo_ds.conformance`. Imports no torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from grpo_ds.config import RecipeError
from grpo_ds.plugin_code import first_line, import_target, one_sentence
from grpo_ds.plugin_options import Option, check_options, read_options

T = TypeVar("T")
_FILE_AND_NAME = r"(.+\.py):(\w+)"
_REGISTRIES: dict[str, Registry] = {}


@dataclass(frozen=True)
class Need:
    """Something a plugin may ask of the trainer by a class attribute."""

    default: bool | int
    """The value of plugins that do not have the attribute; its type is the attribute's type."""
    keyword: str | None = None
    """The keyword argument by which the trainer delivers it; a plugin with the need must accept it, and a plugin that
    accepts it must have the need: else its own default would stand in for what it waits for."""
    in_every_signature: bool = False
    """The contract gives every plugin this keyword, so accepting it says nothing about the need."""


@dataclass(frozen=True)
class PluginRow:
    """One line of the list of plugins."""

    name: str
    source: str
    """The distribution it came from: name and version."""
    module: str
    """Where it is defined: module:Name."""
    needs: Mapping[str, bool | int]
    options: tuple[Option, ...]
    doc: str = ""
    """The first paragraph of its docstring, on one line."""
    problem: str | None = None
    """Why it cannot be used; None: it can."""


@dataclass(frozen=True)
class _Found:
    label: str
    """`estimator 'x' from package 1.0`, the start of every message."""
    source: str
    module: str
    target: Any


class Registry:
    """The plugins of one entry-point group; the package of that name holds the built-in ones."""

    def __init__(
        self,
        group: str,
        kind: str,
        arguments: tuple[str, ...],
        *,
        needs: Mapping[str, Need] = MappingProxyType({}),
        keywords: tuple[str, ...] = (),
        check: Callable[[str, Any], None] | None = None,
    ) -> None:
        """arguments: what the trainer passes by position; keywords: what it may pass by name, so never an option.

        check: takes (label, what is called) and raises RecipeError, for groups that are called with keywords chosen by
        the plugin's own signature; functions of such a group have no options.
        """
        self.group, self.kind, self.arguments, self.keywords = group, kind, arguments, keywords
        self._check = check or self._check_signature
        self._has_options = check is None
        self._needs = dict(needs)
        self._builtin: dict[str, Any] = {}
        _REGISTRIES[group] = self

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make a class or function known as `name`; ValueError where the name is taken."""

        def add(target: T) -> T:
            if name in self._builtin:
                raise ValueError(f"{self.kind} {name!r} is registered already, as {_where(self._builtin[name])}")
            self._builtin[name] = target
            return target

        return add

    def names(self) -> list[str]:
        """All names of built-ins and entry points; nothing is imported."""
        return sorted({*self._builtin, *(entry.name for entry in self._entry_points())})

    def build(
        self, name: str, options: Mapping[str, Any] = MappingProxyType({}), bases: Sequence[Path] = (Path(),)
    ) -> Any:
        """The callable of plugin `name` with these options; RecipeError says what is wrong with either.

        bases: the folders in which `path/file.py:Name` is looked up, in order.
        """
        return self._make(self._find(name, bases), options)

    def _make(self, found: _Found, options: Mapping[str, Any]) -> Any:
        known = self._options(found)
        with one_sentence(found.label, "checking its options"):
            check_options(found.label, known, options)
        if not inspect.isclass(found.target):
            built: Any = functools.partial(found.target, **options) if self._has_options else found.target
        else:
            with one_sentence(found.label, f"making {found.module} from its options"):
                try:
                    built = found.target(**options)
                except (TypeError, ValueError) as error:
                    raise RecipeError(f"{found.label} refuses its options: {first_line(error)}") from error
            if not callable(built):
                raise RecipeError(
                    f"{found.label} is no {self.kind}: instances of {found.module} cannot be called, give it __call__"
                )
        with one_sentence(found.label, "reading its needs and signature"):
            self._check_needs(found.label, built)
            self._check(found.label, built)
        return built

    def label(self, name: str) -> str:
        """`estimator 'x' from package 1.0`, for messages about a plugin that was found."""
        return self._find(name).label

    def target(self, name: str) -> Any:
        """The class or function that plugin `name` is."""
        return self._find(name).target

    def options(self, name: str) -> tuple[Option, ...]:
        """The options plugin `name` takes."""
        return self._options(self._find(name))

    def needs(self, plugin: Any) -> dict[str, bool | int]:
        """What a plugin (its name, the class, or a built one) declares to need; defaults for what it does not say."""
        target = self._find(plugin).target if isinstance(plugin, str) else plugin
        target = target.func if isinstance(target, functools.partial) else target
        return {need: getattr(target, need, spec.default) for need, spec in self._needs.items()}

    def _check_needs(self, label: str, plugin: Any) -> dict[str, bool | int]:
        needs = self.needs(plugin)
        for need, value in needs.items():
            wanted = type(self._needs[need].default)
            if type(value) is not wanted:
                raise RecipeError(f"{label}: its need {need} is {value!r}, not a {wanted.__name__}")
        return needs

    def rows(self) -> list[PluginRow]:
        """One row a name; a broken plugin has its message in `problem`."""
        return [self._row(name) for name in self.names()]

    def _row(self, name: str) -> PluginRow:
        try:
            found = self._find(name)
            options = self._options(found)
            with one_sentence(found.label, "reading its needs"):
                needs = self._check_needs(found.label, found.target)
            if not any(option.required for option in options):
                self._make(found, {})
        except RecipeError as error:
            entries = self._entry_points(name)
            source = ", ".join(sorted({_distribution(entry) for entry in entries})) or _own_version()
            return PluginRow(name, source, entries[0].value if entries else "", {}, (), problem=str(error))
        doc = " ".join((inspect.getdoc(found.target) or "").partition("\n\n")[0].split())
        return PluginRow(name, found.source, found.module, needs, options, doc)

    def _entry_points(self, name: str | None = None) -> list[importlib.metadata.EntryPoint]:
        entries = _installed(self.group, tuple(sys.path))
        distinct = {(entry.name, entry.value, _distribution(entry)): entry for entry in entries}
        return [entry for entry in distinct.values() if name in (None, entry.name)]

    def _find(self, name: str, bases: Sequence[Path] = (Path(),)) -> _Found:
        entries = self._entry_points(name)
        if name in self._builtin:
            target = self._builtin[name]
            # A distribution may also list a built-in as an entry point; that is the same object, and no clash.
            entries = [entry for entry in entries if entry.value != _where(target)]
            if not entries:
                return _Found(f"{self.kind} {name!r} from {_own_version()}", _own_version(), _where(target), target)
            entries_text = f"{_own_version()} (built in), " + ", ".join(map(_distribution, entries))
        else:
            entries_text = ", ".join(_distribution(entry) for entry in entries)
        if len(entries) > 1 or name in self._builtin:
            raise RecipeError(
                f"{self.kind} {name!r} is offered by {entries_text}: uninstall all but one, or name yours by its path "
                f"(package.module.Name), here {entries[0].value.replace(':', '.')}"
            )
        if entries:
            module, _, attribute = entries[0].value.partition(":")
            return self._import(name, _distribution(entries[0]), module, attribute)
        if re.fullmatch(_FILE_AND_NAME, name):
            path, _, attribute = located(name, bases).rpartition(":")
            return self._import(name, f"file {path}", path, attribute)
        if re.fullmatch(r"\w+(\.\w+)+", name):
            module, _, attribute = name.rpartition(".")
            return self._import(name, _owner_of(module), module, attribute)
        near = difflib.get_close_matches(name, self.names(), n=1)
        others = sorted({_distribution(entry) for entry in self._entry_points()} - {_own_version()})
        raise RecipeError(
            f"no {self.kind} is called {name!r}{f', did you mean {near[0]!r}?' if near else ''} "
            f"(there are: {', '.join(self.names())}; installed beside the built-in ones: {', '.join(others) or 'none'}; "
            "or give package.module.Name or path/file.py:Name)"
        )

    def _import(self, name: str, source: str, module: str, attribute: str) -> _Found:
        label = f"{self.kind} {name!r} from {source}"
        return _Found(label, source, f"{module}:{attribute}", import_target(label, module, attribute))

    def _options(self, found: _Found) -> tuple[Option, ...]:
        if not self._has_options and not inspect.isclass(found.target):
            return ()
        with one_sentence(found.label, "reading its options"):
            return read_options(found.label, found.target, reserved=self.keywords)

    def _check_signature(self, label: str, built: Any) -> None:
        signature, needs, keywords = inspect.signature(built), self.needs(built), []
        for need, spec in self._needs.items():
            if needs[need] and spec.keyword:
                keywords.append(spec.keyword)
            elif spec.keyword in signature.parameters and not spec.in_every_signature:
                raise RecipeError(
                    f"{label} takes {spec.keyword} but does not declare {need}, so the trainer would never pass it: set "
                    f"{need} = True on it, or remove the parameter"
                )
        given = ", ".join([*self.arguments, *(f"{keyword}=..." for keyword in keywords)])
        try:
            signature.bind(*self.arguments, **dict.fromkeys(keywords))
        except TypeError as error:
            raise RecipeError(f"{label} cannot be called with ({given}): {error}") from error


def registry(group: str) -> Registry:
    """The registry of an entry-point group, its built-ins loaded."""
    if group not in _REGISTRIES:
        try:
            importlib.import_module(group)
        except ModuleNotFoundError as error:
            raise RecipeError(f"no plugin group is called {group!r} (loaded: {', '.join(_REGISTRIES)})") from error
    if group not in _REGISTRIES:
        raise RecipeError(f"package {group!r} has no plugins (loaded: {', '.join(_REGISTRIES)})")
    return _REGISTRIES[group]


def list_plugins(group: str) -> list[PluginRow]:
    """All plugins of `grpo_ds.estimators`, `grpo_ds.losses`, ...; every entry point is imported to read its options."""
    return registry(group).rows()


def located(name: str, bases: Sequence[Path]) -> str:
    """`path/file.py:Name` with the path of the first of `bases` that has the file; any other name as it is.

    RecipeError naming every place where the file was looked for.
    """
    match = re.fullmatch(_FILE_AND_NAME, name)
    if not match:
        return name
    places = [(base / match[1]).resolve() for base in bases]
    for place in places:
        if place.is_file():
            return f"{place}:{match[2]}"
    raise RecipeError(f"plugin file {match[1]} does not exist (looked for {', '.join(map(str, places))})")


def _where(target: Any) -> str:
    return f"{target.__module__}:{target.__qualname__}"


def _own_version() -> str:
    from grpo_ds import __version__

    return f"grpo_ds {__version__}"


@functools.lru_cache(maxsize=16)
def _installed(group: str, path: tuple[str, ...]) -> importlib.metadata.EntryPoints:
    """A group's entry points on the import path. Looked up once: each look reads the files of all distributions."""
    return importlib.metadata.entry_points(group=group)


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _owner_of(module: str) -> str:
    owners = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
    return (
        ", ".join(f"{owner} {importlib.metadata.version(owner)}" for owner in sorted(set(owners))) or "the import path"
    )
