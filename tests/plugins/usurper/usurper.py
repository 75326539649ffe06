"""A second distribution that offers a name of the first."""

from __future__ import annotations

from typing import Any


class Contested:
    def __call__(self, token_rewards: Any, response_mask: Any, group_index: Any) -> Any:
        return token_rewards, token_rewards
