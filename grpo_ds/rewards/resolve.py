"""The registry of rewards, and from an entry of `reward.functions` to the function. Runs in the reward processes;
imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from grpo_ds.config import RecipeError
from grpo_ds.plugins import Registry
from grpo_ds.rewards.builtin import BUILTINS


def _check_reward(label: str, function: Any) -> None:
    """Refuse what cannot be called with keywords, or gives a coroutine; which keywords it takes depends on the data."""
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object's own async __call__ is what is asked for
    )
    if asynchronous or inspect.isasyncgenfunction(function):
        raise RecipeError(f"{label} is an async function, which is not supported; make it a plain def")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RecipeError(f"{label} takes {parameter.name!r} by position only; rewards are called by keyword")


REGISTRY = Registry(group="grpo_ds.rewards", kind="reward", arguments=(), check=_check_reward)
for _name, _function in BUILTINS.items():
    REGISTRY.register(_name)(_function)


def resolve(
    spec: str, base_dirs: Sequence[Path], options: Mapping[str, Any] = MappingProxyType({})
) -> Callable[..., Any]:
    """The function that `spec` names: a built-in, an entry point, `package.module.function` or `path/file.py:function`.

    A class is made with `options` (reward.function_args). A file is looked up in each of `base_dirs`. Raises RecipeError,
    in one sentence that names the distribution it came from, when there is no such function or it is not one that can be
    called with keywords.
    """
    try:
        function: Callable[..., Any] = REGISTRY.build(spec, options, bases=base_dirs)
    except RecipeError as error:
        raise RecipeError(f"reward.functions: {error}") from error
    return function


def function_names(specs: Sequence[str]) -> list[str]:
    """Short unique names for metrics and `parts`: the function's own name, or the whole spec where names collide.

    `score` alone is the weighted sum of all of them (`Scored.metric`), so a function of that name goes by its spec.

    >>> function_names(["gsm8k", "rewards/length.py:score", "pkg.format.score"])
    ['gsm8k', 'rewards/length.py:score', 'pkg.format.score']
    >>> function_names(["rewards/length.py:short", "pkg.format.tags", "pkg.rubric.score"])
    ['short', 'tags', 'pkg.rubric.score']
    """
    short = [spec.rpartition(":")[2].rpartition(".")[2] for spec in specs]
    return [
        name if short.count(name) == 1 and name != "score" else spec for name, spec in zip(short, specs, strict=True)
    ]
