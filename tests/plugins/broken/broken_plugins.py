"""Every way to get a plugin wrong that is not a failing import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Estimator:
    def __call__(self, token_rewards: Any, response_mask: Any, group_index: Any) -> Any:
        return token_rewards, token_rewards


@dataclass(frozen=True, kw_only=True)
class Picky(Estimator):
    alpha: float = 0.5
    """A number."""


@dataclass(frozen=True, kw_only=True)
class Hungry(Estimator):
    min_group_size: ClassVar[int] = 64


@dataclass(frozen=True, kw_only=True)
class Deaf(Estimator):
    """Asks for greedy rewards and has no parameter to take them."""

    greedy_baseline: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Eager(Estimator):
    """Looks for its hardware while it is made."""

    def __post_init__(self) -> None:
        raise RuntimeError("no accelerator was found\nsee the manual")


@dataclass(frozen=True, kw_only=True)
class Vague(Estimator):
    """States a need in words, and has an option without a default."""

    beta: float

    min_group_size: ClassVar[str] = "yes"


@dataclass(frozen=True, kw_only=True)
class Forgetful:
    """Takes all_reduce and never says that it needs the whole batch."""

    def __call__(self, token_rewards: Any, response_mask: Any, group_index: Any, *, all_reduce: Any = None) -> Any:
        return token_rewards, token_rewards


class Silent:
    """An estimator without __call__."""


def takes_two(token_rewards: Any, response_mask: Any) -> Any:
    return token_rewards, token_rewards


SETTINGS = {"alpha": 0.5}
