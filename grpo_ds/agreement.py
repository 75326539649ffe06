"""What all ranks must have read alike: each reads the recipe, and each node its data, from files of its own.

The roll call compares these texts before anything else is done together (`grpo_ds.rollcall`): with different ones the
ranks would train on something that nobody wrote, or wait in different collectives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_ds.config import Recipe
from grpo_ds.plugins import located
from grpo_ds.prompts import PromptStream
from grpo_ds.recipe import recipe_keys
from grpo_ds.rollcall import DIGEST
from grpo_ds.types import Prompt

_LONGEST = 40
_MAY_DIFFER = {
    # Rank 0 alone looks for the run's folder, and tells the others.
    *("run.dir", "run.name", "resume"),
    # Where a node keeps the engine.
    "engine.python",
    # Where a node keeps them; what they hold is compared.
    *("data.train", "data.heldout", "actor.deepspeed", "reference.deepspeed"),
}
_CODE = {"reward.functions", "algorithm.adv_estimator", "algorithm.filter_groups.filter", "actor.policy_loss_fn"}
"""Keys of which `path/file.py:Name` is a value: the files are compared, not where a node keeps them."""


def terms(
    recipe: Recipe,
    bases: Sequence[Path],
    deepspeed: Mapping[str, Mapping[str, Any]],
    prompts: PromptStream | None,
    heldout: Sequence[Prompt] | None,
) -> dict[str, str]:
    """{what was read: a text that is equal exactly where it is}, about 4 KB.

    deepspeed: what the files hold that these recipe keys name. prompts: None where this rank has read no data. heldout:
    None where the recipe has none.
    """
    found = {key: _text(_value(recipe, key, bases)) for key in _keys() if key not in _MAY_DIFFER}
    found |= {f"the file of {key}": _digest([content]) for key, content in deepspeed.items()}
    if prompts is not None:
        # Token ids, and what the reward functions get: an answer that was mended on one node counts.
        found["the rows of data.train"] = _digest(prompts.take(0, len(prompts)))
        found["the rows of data.heldout"] = _digest(heldout or ())
    return found


def _keys() -> list[str]:
    """Every dotted key that is no section."""
    return [key for key, kind in recipe_keys().items() if not dataclasses.is_dataclass(kind)]


def _value(recipe: Recipe, key: str, bases: Sequence[Path]) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    if key not in _CODE:
        return value
    return [_code(name, bases) for name in value] if isinstance(value, list) else _code(value, bases)


def _code(name: str, bases: Sequence[Path]) -> str:
    file = re.fullmatch(r"(.+\.py):(\w+)", located(name, bases))
    return f"{_digest([Path(file[1]).read_bytes()])}:{file[2]}" if file else name


def _text(value: Any) -> str:
    whole = repr(value)
    return whole if len(whole) <= _LONGEST else _digest([value])


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part!r};".encode(errors="surrogatepass"))
    return DIGEST + digest.hexdigest()[:16]
