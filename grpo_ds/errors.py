"""What every check of the user's input raises. Imports nothing."""

from __future__ import annotations

import math


class RecipeError(ValueError):
    """The user's input is wrong; the message is one sentence: what, where, what to do."""


def require(ok: bool, message: str) -> None:
    """RecipeError with this message unless `ok`."""
    if not ok:
        raise RecipeError(message)


def require_positive(section: str, settings: object, *names: str) -> None:
    """RecipeError unless each of these settings is above 0; NaN is not."""
    for name in names:
        require(getattr(settings, name) > 0, f"{section}.{name} is {getattr(settings, name)}, it must be positive")


def require_from_zero(section: str, settings: object, *names: str, zero: str = "") -> None:
    """RecipeError unless each of these settings is finite and not negative; zero: what 0 means, which others spell -1."""
    for name in names:
        value = getattr(settings, name)
        meaning = f" (0: {zero})" if zero else ""
        require(0 <= value < math.inf, f"{section}.{name} is {value}, it must be a finite number from 0 up{meaning}")
