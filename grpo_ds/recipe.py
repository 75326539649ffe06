"""Recipe file + command line -> `Recipe`; the only file that knows jsonargparse. No torch here.

`--recipe NAME` takes a bare name of recipes/, or a path; dotted options after it override the file. Every mistake is a
`RecipeError` of one sentence that names the key and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from grpo_ds.config import Recipe, RecipeError

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder: recipes/ and ds_configs/ lie beside the package."""

RECIPES = ROOT / "recipes"


@functools.cache
def build_parser() -> ArgumentParser:
    """The command line of launch/train.py. Made once: it takes half a second, for the docstrings of all settings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        description="Train a language model by GRPO, DAPO or a relative on DeepSpeed.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument(
        "--recipe", "--config", action="config", help="recipe: a name of recipes/ or a path to a YAML file"
    )
    parser.add_class_arguments(Recipe, None, fail_untyped=True)
    return parser


def recipe_keys(cls: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the recipe with its type; sections are included."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        keys[prefix + f.name] = hints[f.name]
        if dataclasses.is_dataclass(hints[f.name]):
            keys |= recipe_keys(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
    return keys


def _unknown_key(key: str, where: str) -> RecipeError:
    known = recipe_keys()
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        k for k in known if k.split(".")[-1] == key.split(".")[-1]
    ]
    hint = f"did you mean `{near[0]}`?" if near else f"the sections are {', '.join(k for k in known if '.' not in k)}"
    return RecipeError(f"{where}: unknown key `{key}`; {hint}")


def _check_keys(tree: dict[str, Any], where: str, prefix: str = "") -> None:
    known = recipe_keys()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise _unknown_key(key, where)
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise RecipeError(f"{where}: `{key}` is a section with keys of its own, got {value!r}")
            _check_keys(value, where, f"{key}.")


def resolve_recipe_path(name: str) -> Path:
    """A path as it is, or a bare name (with or without .yaml) of recipes/."""
    for candidate in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    have = ", ".join(sorted(p.name for p in RECIPES.glob("*.yaml")))
    raise RecipeError(f"--recipe {name}: no such file, and recipes/ has only: {have}")


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML's readers silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise RecipeError(
                        f"{self.name}: `{key.value}` stands twice in one section, in lines {seen[key.value]} and {line}: "
                        "make them one"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _OnceLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model:, data:, ...), got {type(tree).__name__}")
    return tree


def _resolve_argv(argv: list[str]) -> tuple[list[str], Path | None]:
    """Replaces the recipe's name by its path and checks the keys of the file.

    `--local_rank`, which the deepspeed launcher puts there, is dropped: ranks are known from the environment, and it
    is no part of the recipe that `--print_config` shows.
    """
    out: list[str] = []
    path: Path | None = None
    items = iter(argv)
    for item in items:
        flag, eq, value = item.partition("=")
        if flag == "--local_rank":
            value = value if eq else next(items, "")
            continue
        if flag not in ("--recipe", "--config"):
            out.append(item)
            continue
        name = value if eq else next(items, "")
        path = resolve_recipe_path(name)
        _check_keys(_load_yaml(path), str(path))
        out += ["--recipe", str(path)]
    return out, path


def _speak(error: Exception, path: Path | None) -> RecipeError:
    text = " ".join(str(error).split())
    where = str(path) if path else "command line"
    if text.lower().startswith("unrecognized arguments: "):
        key = text.split(": ", 1)[1].split()[0].lstrip("-").split("=")[0]
        return _unknown_key(key, "command line")
    if "are required" in text:
        text += "; give them in the recipe, or name a recipe with --recipe"
    typed = re.match(r'Parser key "([\w.]+)": (.*?)\.? Got value: (.*)', text)
    if typed:
        key, expected, value = typed.groups()
        return RecipeError(f"`{key}` (from {where} or an option after it): {expected}, got `{value}`")
    return RecipeError(f"{where} and the options after it: {text}")


def read_recipe(argv: list[str]) -> tuple[Recipe, list[Path]]:
    """Reads the command line.

    Returns the recipe and the folders against which its relative paths are resolved (working directory first, then
    the recipe's own). Raises RecipeError on any mistake; `--help` and `--print_config` print and exit 0.
    """
    argv, path = _resolve_argv(argv)
    parser = build_parser()
    if {"-h", "--help"} & set(argv):
        # Plugins are known only once their packages are imported, and they import torch.
        from grpo_ds.plugin_list import plugin_help

        parser.print_help()
        print(f"\n{plugin_help()}")
        raise SystemExit(0)
    try:
        namespace: Namespace = parser.parse_args(argv)
        parts = parser.instantiate(namespace)
        recipe = Recipe(**{f.name: parts[f.name] for f in dataclasses.fields(Recipe)})
    except Exception as error:  # jsonargparse wraps what it meets in several types; all of them are the user's input
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, RecipeError):
                raise RecipeError(f"{path or 'command line'}: {cause}") from None
            cause = cause.__cause__ or cause.__context__
        raise _speak(error, path) from None
    bases = [Path.cwd()]
    if path is not None and path.resolve().parent not in bases:
        bases.append(path.resolve().parent)
    return recipe, bases


def resolve_path(value: str, bases: list[Path]) -> Path | None:
    """`value` as an existing file or folder under one of `bases`, else None (then it may be a hub name)."""
    for base in bases:
        candidate = base / os.path.expanduser(value)
        if candidate.exists():
            return candidate.resolve()
    return None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; reading it again gives an equal recipe."""
    tree = dataclasses.asdict(recipe)
    tree["actor"]["betas"] = list(recipe.actor.betas)
    return yaml.safe_dump(tree, sort_keys=False)
