"""The reward functions that come with the package, by name. Their ground truth is a column of the data."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

# A hyphen right behind a digit, a letter or a bracket is none of the number's ("3-5", "GPT-4"); U+2212 is a minus.
_SIGNED = r"(?:(?<![\w)\]}])[-\u2212])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(_SIGNED)
_MARKED = re.compile(rf"####\s*\$?({_SIGNED})")
_TRUTH_COLUMNS = ("answer", "ground_truth", "solution")


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("\u2212", "-"))


def _truths(function: str, columns: dict[str, list[Any]]) -> list[Any]:
    """The ground truth of each sample, from the first column present; None where a row has none."""
    for name in _TRUTH_COLUMNS:
        if name in columns:
            return columns[name]
    raise ValueError(f"{function} needs a data column named {', '.join(_TRUTH_COLUMNS[:-1])} or {_TRUTH_COLUMNS[-1]}")


def arithmetic(completions: list[Any], **columns: Any) -> list[float | None]:
    """1 where the completion, without surrounding white space, is the ground truth; otherwise 0."""
    truths = _truths("arithmetic", columns)
    return [
        None if truth is None else float(_text(completion).strip() == str(truth).strip())
        for completion, truth in zip(completions, truths, strict=True)
    ]


def _final_truth(truth: Any) -> str:
    """The answer alone, also from GSM8K's worked solutions, which end in `#### answer`."""
    return str(truth).rsplit("####", 1)[-1].strip()


def exact_match(completions: list[Any], **columns: Any) -> list[float | None]:
    """1 where the completion's last number equals the ground truth; a ground truth that is no number is compared with
    the completion's last line, ignoring case.

    >>> exact_match(["so 3 + 4 = 7.0"], answer=["7"])
    [1.0]
    """
    return [
        None if truth is None else _exact(_text(completion), _final_truth(truth))
        for completion, truth in zip(completions, _truths("exact_match", columns), strict=True)
    ]


def _exact(completion: str, truth: str) -> float:
    if _NUMBER.fullmatch(truth.lstrip("$")):
        found = _NUMBER.findall(completion)
        return float(bool(found) and _number(found[-1]) == _number(truth.lstrip("$")))
    lines = completion.strip().splitlines()
    return float(bool(lines) and lines[-1].strip().casefold() == truth.casefold())


def gsm8k(completions: list[Any], **columns: Any) -> list[float | None]:
    """1 where the last `#### number` of the completion equals the ground truth; 0 where it differs or is missing.

    A missing ground truth, or one without a number, cannot be scored.

    >>> gsm8k(["2 dozen eggs. #### 24", "24"], answer=["12 * 2 = 24\\n#### 24", "24"])
    [1.0, 0.0]
    """
    return [
        _gsm8k(_text(completion), truth)
        for completion, truth in zip(completions, _truths("gsm8k", columns), strict=True)
    ]


def _gsm8k(completion: str, truth: Any) -> float | None:
    wanted = None if truth is None else _NUMBER.search(_final_truth(truth))
    if wanted is None:
        return None
    found = _MARKED.findall(completion)
    return float(bool(found) and _number(found[-1]) == _number(wanted.group()))


BUILTINS: dict[str, Callable[..., list[float | None]]] = {
    "arithmetic": arithmetic,
    "exact_match": exact_match,
    "gsm8k": gsm8k,
}
