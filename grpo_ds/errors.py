"""What every check of the user's input raises. Imports nothing."""

from __future__ import annotations


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
