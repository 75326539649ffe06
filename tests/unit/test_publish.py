"""What a publication says when an engine is silent; what arrives is tested with real ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from grpo_ds.config import EngineConfig, SyncConfig
from grpo_ds.engine.base import Request, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from grpo_ds.sync.publish import SyncError, WeightPublisher
from tests.unit.engine_fakes import Diary, FakeEngine, OneRank, answer_to


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


def hang(engine: FakeEngine, step: str) -> None:
    """From this step on it answers nothing."""

    def never(*arguments: Any) -> None:
        engine.stopped = True
        engine._reach()

    setattr(engine, step, never)


def test_replicas_that_hang_in_turn_are_taken_out_before_the_publication_gives_up() -> None:
    """Each is silent for less than engine.stall_timeout_s; together they would be so for longer than sync.timeout_s."""
    diary, sync = Diary(), SyncConfig(timeout_s=6.0)
    config = EngineConfig(replicas=3, max_restarts=2, start_timeout_s=5, stall_timeout_s=5.0)
    pool = EnginePool(lambda index: FakeEngine(index, diary), config, sync.timeout_s)
    pool.start()
    pool.wait_ready()
    hang(diary.made[0], "begin_update")
    hang(diary.made[1], "update_bucket")
    publisher = WeightPublisher(nn.Linear(2, 2), OnlyRank(), pool, sync)  # type: ignore[arg-type]
    try:
        publisher.publish(7)
        assert pool.take_counts()["quarantined"] == 2
        asked = [Request((1, 2), 5, "r")]
        assert pool.generate(asked, SamplingSpec(n=1, max_tokens=4)) == [answer_to(asked[0], SamplingSpec(1, 4), 7)]
    finally:
        publisher.close()
        pool.close()
