"""What runs inside a reward process. Imports no torch and nothing that does.

Everything a reward function does wrong is turned into a `CallResult` of plain values here: the parent never unpickles
an exception or a result object of foreign code.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import numbers
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_ds.config import RecipeError
from grpo_ds.rewards.resolve import function_names, resolve

_PR_SET_PDEATHSIG = 1
# Variables by which libraries believe they are a rank of the training job.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")

Status = Literal["ok", "raised", "value", "count", "recipe"]


@dataclass(frozen=True, slots=True)
class CallResult:
    """The outcome of one call."""

    status: Status
    """ok; raised: the function raised; value: a returned value is no number; count: not one value a sample;
    recipe: the function cannot be called at all."""
    values: tuple[float | None, ...] = ()
    """One a sample where status is ok, otherwise empty."""
    message: str = ""
    """What went wrong, in words that follow the function's name or, for recipe, stand alone."""
    position: int = 0
    """Sample of the call that a wrong value belongs to."""
    seconds: float = 0.0
    """Duration of the call."""


_functions: list[Callable[..., Any] | CallResult] = []
_names: list[str] = []


def start(functions: Sequence[tuple[str, dict[str, Any]]], base_dirs: Sequence[str], parent_pid: int) -> None:
    """Prepares the process, then loads every reward function, with its options, once.

    A function that cannot be loaded is remembered as the answer to every call: raising here would only make the pool
    replace the process again and again.
    """
    _die_with_parent(parent_pid)
    # The pool's own handler waits for the next bytecode; a function stuck inside C code must die at once, too.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    _names[:] = function_names([spec for spec, _ in functions])
    _functions[:] = [_load(spec, options, [Path(base) for base in base_dirs]) for spec, options in functions]


def _die_with_parent(parent_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # the parent died before the line above
        os._exit(1)


def _load(spec: str, options: dict[str, Any], base_dirs: Sequence[Path]) -> Callable[..., Any] | CallResult:
    try:
        return resolve(spec, base_dirs, options)
    except RecipeError as error:
        return CallResult(status="recipe", message=str(error))
    except (Exception, SystemExit) as error:
        return CallResult(
            status="recipe",
            message=f"reward.functions: importing {spec!r} failed: {describe(error)}; correct the module",
        )


def call(which: int, keywords: dict[str, Any]) -> CallResult:
    """Calls reward function number `which` on the samples in `keywords` (each value a list, one entry a sample)."""
    function = _functions[which]
    if isinstance(function, CallResult):
        return function
    chosen = _chosen_keywords(function, keywords, _names[which])
    if isinstance(chosen, CallResult):
        return chosen
    begin = time.perf_counter()
    try:
        returned = function(**chosen)
    except (Exception, SystemExit) as error:
        return CallResult(status="raised", message=f"raised {describe(error)}", seconds=time.perf_counter() - begin)
    return _checked(returned, len(keywords["completions"]), time.perf_counter() - begin)


def _chosen_keywords(function: Callable[..., Any], keywords: dict[str, Any], name: str) -> dict[str, Any] | CallResult:
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in keywords]
    if missing:
        return CallResult(
            status="recipe",
            message=f"reward.functions: {name} needs the keyword {missing[0]!r}, but the data offers only "
            f"{', '.join(sorted(keywords))}; rename a column with data.columns or change the function",
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return keywords
    return {key: keywords[key] for key in named if key in keywords}


def _checked(returned: Any, samples: int, seconds: float) -> CallResult:
    if not isinstance(returned, (list, tuple)):
        message = f"returned a {type(returned).__name__} instead of a list with one number or None a completion"
        return CallResult(status="count", message=message, seconds=seconds)
    if len(returned) != samples:
        message = f"returned {len(returned)} values for {samples} completions"
        return CallResult(status="count", message=message, seconds=seconds)
    values: list[float | None] = []
    for position, value in enumerate(returned):
        try:
            number, fault = _number(value)
        except (Exception, SystemExit) as error:  # the value's own code: __float__, __repr__
            number, fault = None, f"returned a {type(value).__name__} that is no number: {describe(error)}"
        if fault:
            return CallResult(status="value", message=fault, position=position, seconds=seconds)
        values.append(number)
    return CallResult(status="ok", values=tuple(values), seconds=seconds)


def _number(value: Any) -> tuple[float | None, str]:
    """A returned value as a number or None, and what is wrong with it (empty: nothing)."""
    if value is None:
        return None, ""
    if not isinstance(value, numbers.Real):
        return None, f"returned a {type(value).__name__} ({value!r:.80}) where a number or None is needed"
    number = float(value)
    return number, "" if math.isfinite(number) else f"returned {number}, which is no score"


def describe(error: BaseException) -> str:
    """The last line of the traceback, with the place where it was raised."""
    line = " ".join(traceback.format_exception_only(error)[-1].split())
    frames = traceback.extract_tb(error.__traceback__)
    return f"{line} ({frames[-1].filename}:{frames[-1].lineno})" if frames else line
