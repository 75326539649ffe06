"""What the wires of vLLM and SGLang share: a command line from options, and a response that is whole. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

from grpo_ds.config import RecipeError
from grpo_ds.engine.base import EngineError, RawRollout, parse_version
from grpo_ds.types import FinishReason, VersionSpan

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_FILES = ("config",)
"""Options that bring others, from a file that nobody has checked."""


def user_options(user: dict[str, Any], reserved: Iterable[str]) -> dict[str, Any]:
    """`engine.args` with underscores in the names.

    Raises RecipeError for an option of `reserved` (a name that ends with * stands for all that begin so), for the
    beginning of one, which the engines take for the whole, and for what is no plain option and could hide one.
    """
    for key, value in user.items():
        if not _NAME.fullmatch(key):
            raise RecipeError(
                f"engine.args contains {key!r}: give an option's name without dots and leading dashes, and a mapping for "
                "an option that has parts"
            )
        if any(str(word).startswith("--") for word in (value if isinstance(value, list) else [value])):
            raise RecipeError(f"engine.args.{key} has a value that begins with --: it would be taken for an option")
    given = {key.replace("-", "_"): key for key in user}
    for option, key in given.items():
        for name in (*reserved, *_FILES):
            family = name.endswith("*") and option.removeprefix("no_").startswith(name[:-1])
            if family or name == option.removeprefix("no_"):
                raise RecipeError(f"engine.args.{key} is set by grpo_ds, which depends on its value: remove it")
            if name.startswith(option):
                raise RecipeError(
                    f"engine.args.{key} is the beginning of {name.removesuffix('*')}, which is set by grpo_ds: write the "
                    "option that is meant in full"
                )
    return {option: user[key] for option, key in given.items()}


def command_line(ours: dict[str, Any], user: dict[str, Any], switch: Callable[[str, bool], list[str]]) -> list[str]:
    """The flags of a server, without its port: ours, overridden by the user's; the value null removes one.

    switch: the words for an option (`--like-this`) that is true or false.
    """
    words: list[str] = []
    for key, value in (ours | user).items():
        name = "--" + key.replace("_", "-")
        if key == "port" or value is None:
            continue
        if isinstance(value, bool):
            words += switch(name, value)
        elif isinstance(value, list):
            words += [name, *map(str, value)]
        else:
            words += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def whole_rollout(
    what: str,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    spans: Iterable[dict[str, Any]] | None,
    reason: Any,
) -> RawRollout:
    """One response. what: its name in errors. spans: {"version", "start", "end"} each.

    Raises EngineError unless each token has a log-probability and lies in one span. Only an aborted response may be
    empty.
    """
    made = tuple(VersionSpan(parse_version(span["version"]), span["start"], span["end"]) for span in spans or ())
    covered = [position for span in made for position in range(span.start, span.end)]
    whole = len(logprobs) == len(tokens) and covered == list(range(len(tokens)))
    whole = whole and (reason == "abort" or len(tokens) > 0)
    if not whole or reason not in get_args(FinishReason):
        raise EngineError(
            f"{what} is not whole: {len(tokens)} tokens, {len(logprobs)} log-probabilities, version spans {made}, "
            f"finish reason {reason!r}"
        )
    return RawRollout(tuple(tokens), tuple(float(value) for value in logprobs), reason, made)
