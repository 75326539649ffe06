"""Seeds as functions of what is sampled, so that no rank layout, batch order or restart can change them."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**31) from the run's seed, a purpose, the round and the prompt.

    >>> derive_seed(0, "rollout", 1, 7) == derive_seed(0, "rollout", 1, 7) != derive_seed(0, "rollout", 1, 8)
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
