"""A world of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from grpo_ds.dist import Ranks

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        for name in _VARIABLES:
            patch.delenv(name, raising=False)
        made = Ranks(60.0)
        made.connect("gloo")
        yield made
        made.close()
        for name in _VARIABLES:
            os.environ.pop(name, None)
