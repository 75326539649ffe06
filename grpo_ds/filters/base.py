"""What a filter says, and the registry of filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_ds.plugins import Registry

REGISTRY = Registry(group="grpo_ds.filters", kind="filter", arguments=("scores",))
register = REGISTRY.register


@dataclass(frozen=True)
class Decision:
    """Whether a group is trained on, and why."""

    keep: bool
    reason: str
    """A short word to count by: `kept`, `all_right`, ..."""


def get_filter(name: str, **options: Any) -> Any:
    """Build a filter: a built-in, an entry point, `package.module.Name` or `path/file.py:Name`.

    Raises RecipeError for an unknown name, a broken plugin, and options it does not take.
    """
    return REGISTRY.build(name, options)
