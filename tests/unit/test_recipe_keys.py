"""Every key of a recipe is read by something: a key that does nothing would be a promise that nobody keeps.

Found in the source, by names: `recipe.actor.lr` reads actor.lr, and so does `config.lr` where `config` is annotated as
an ActorConfig in that file, or was assigned something that ends in `.actor`. What this cannot see: whether the value
that was read has any effect, and whether a name that is bound twice in a file means another section. Keys of config.py's
own properties count as read where the property is.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_ds import config
from grpo_ds.recipe import recipe_keys

PACKAGE = Path(config.__file__).parent
CLASSES = {name: kind for name, kind in vars(config).items() if dataclasses.is_dataclass(kind)}
KEYS = {key: kind for key, kind in recipe_keys().items() if not dataclasses.is_dataclass(kind)}
SECTIONS: dict[str, str] = {key: kind.__name__ for key, kind in recipe_keys().items() if key not in KEYS}
"""Dotted section -> name of its class."""
Read = tuple[str, str]
"""(class of the section, field or property)."""


def last_name(node: ast.AST) -> str:
    """The part of `a.b.c` that says what it is."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def names_of_sections(tree: ast.AST) -> dict[str, set[str]]:
    """Name -> the classes of the sections that it stands for somewhere in the file."""
    names: dict[str, set[str]] = {"recipe": {"Recipe"}, "self.recipe": {"Recipe"}}
    for section, kind in SECTIONS.items():
        names.setdefault(section.rpartition(".")[2], set()).add(kind)
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            kinds = {last_name(part) for part in ast.walk(node.annotation)} & set(CLASSES)
            names.setdefault(name, set()).update(kinds)
    for _ in range(2):  # a name may stand for a name
        for target, value in assignments(tree):
            known = names.get(last_name(value), set()) if isinstance(value, (ast.Attribute, ast.Name)) else set()
            names.setdefault(last_name(target), set()).update(known)
    return names


def assignments(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(target.elts, node.value.elts, strict=False)
                else:
                    yield target, node.value


def reads_of(source: str) -> set[Read]:
    """The fields and properties of sections that a file reads."""
    tree = ast.parse(source)
    names, found = names_of_sections(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found |= {(kind, node.attr) for kind in names.get(last_name(node.value), ())}
        elif isinstance(node, ast.Call) and last_name(node.func) == "getattr":
            kinds = names.get(last_name(node.args[0]), set())
            words = {c.value for c in ast.walk(tree) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
            found |= {(kind, word) for kind in kinds for word in words if word in fields_of(kind)}
    return found


def fields_of(kind: str) -> set[str]:
    return {field.name for field in dataclasses.fields(CLASSES[kind])}


def through_properties(read: set[Read]) -> set[Read]:
    """What config.py's properties read of their own class and of its sections, for those properties that are read."""
    found = set(read)
    classes = [node for node in ast.parse((PACKAGE / "config.py").read_text()).body if isinstance(node, ast.ClassDef)]
    for owner, member in ((kind, part) for kind in classes for part in kind.body):
        if isinstance(member, ast.FunctionDef) and member.decorator_list and (owner.name, member.name) in read:
            found |= reads_of(ast.unparse(member).replace("self.", "recipe."))
            found |= {(owner.name, last_name(part)) for part in ast.walk(member) if last_name(part)}
    return found


def all_reads() -> set[Read]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "config.py"]
    return through_properties({read for path in files for read in reads_of(path.read_text())})


def class_of(key: str) -> Read:
    section, _, name = key.rpartition(".")
    return (SECTIONS[section] if section else "Recipe", name)


def test_every_key_is_read_somewhere() -> None:
    read = all_reads()
    idle = sorted(key for key in KEYS if class_of(key) not in read)
    assert not idle, f"no code reads {idle}"
    assert len(KEYS) > 80


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("x = recipe.actor.lr", {("ActorConfig", "lr")}),
        ("def f(c: ModelConfig):\n    return c.path", {("ModelConfig", "path")}),
        ("r = self.recipe.rollout\nprint(r.n)", {("RolloutConfig", "n")}),
        ("a, b = recipe.train, 1\nprint(a.seed)", {("TrainConfig", "seed")}),
        ("for n in ('verify',):\n    getattr(recipe.sync, n)", {("SyncConfig", "verify")}),
        ("path.name", set()),
        ("recipe.actor.lr = 1", set()),
    ],
)
def test_the_reader_sees_the_ways_in_which_keys_are_read(source: str, wanted: Any) -> None:
    assert {read for read in reads_of(source) if read[1] in fields_of(read[0])} - section_reads() == wanted


def section_reads() -> set[Read]:
    return {class_of(section) for section in SECTIONS}
