"""What a publication says when an engine is silent; what arrives is tested with real ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from grpo_ds.config import SyncConfig
from grpo_ds.sync.publish import SyncError, WeightPublisher
from tests.unit.engine_fakes import OneRank


class OnlyRank(OneRank):
    rank, world, leads_node, timeout_s = 0, 1, True, 1.0

    def barrier(self, what: str) -> None:
        pass

    def max(self, values: Tensor, what: str) -> Tensor:
        return values


class Silent:
    """An engine that never comes back from one step."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.released = threading.Event()

    def _does(self, step: str) -> None:
        if step == self.step:
            assert self.released.wait(60)

    def pause(self) -> None:
        self._does("pause")

    def begin_update(self, names: Sequence[str]) -> None:
        self._does("begin")

    def update_bucket(self, bucket: dict[str, Any], carrier: Any = None) -> None:
        self._does("bucket")


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Silent]:
    made = Silent(request.param)
    yield made
    made.released.set()


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ("pause", "`pause`: the engine of node 0 was not done 0.9 s after it was asked (0.9 of the 1 s of train.coll"),
        ("begin", "`begin`: the engine of node 0 was not done 0.5 s (sync.timeout_s) after it had paused"),
        ("bucket", "`bucket 1`: the engine of node 0 was not done 0.5 s (sync.timeout_s) after it had paused"),
    ],
    indirect=["engine"],
    ids=["pause", "begin", "bucket"],
)
def test_an_engine_that_is_silent_in_a_step_ends_the_publication_by_name(engine: Silent, says: str) -> None:
    publisher = WeightPublisher(nn.Linear(2, 2), OnlyRank(), engine, SyncConfig(timeout_s=0.5))  # type: ignore[arg-type]
    begun = time.monotonic()
    with pytest.raises(SyncError) as error:
        publisher.publish(7)
    assert time.monotonic() - begun < 10
    assert "publishing policy version 7 failed in step " + says in str(error.value)
    publisher.close()
