"""Checksums of a publication: what an engine reads is what was written, or the tensor is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_ds.config import EngineConfig, SyncConfig
from grpo_ds.dist import Ranks
from grpo_ds.engine.base import Carrier, EngineSettings
from grpo_ds.engine.hf import HfEngine
from grpo_ds.sync.publish import VERIFY_EVERY, SyncError, WeightPublisher, verified
from tests.engine.bench import MAX_MODEL_LEN, make_model
from tests.models import save_model

VICTIM = "model.layers.1.self_attn.k_proj.weight"


class Flipping(HfEngine):
    """Between the trainer's writing and the engine's reading, one byte of one tensor changes."""

    victim: str | None = None
    sums: list[dict[str, int]]

    def update_bucket(self, bucket: dict[str, Any], carrier: Carrier | None = None) -> None:
        self.sums.append(bucket["sums"])
        for entry in bucket["tensors"]:
            if entry["name"] == self.victim:
                with open(bucket["path"], "r+b") as file:
                    byte = os.pread(file.fileno(), 1, entry["offset"] + 5)
                    os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), entry["offset"] + 5)
        super().update_bucket(bucket, carrier)


class Wrapped(torch.nn.Module):
    """The model under the name that the trainer gives it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flipping]:
    path = save_model(make_model(tied=True), tmp_path_factory.mktemp("verify") / "model")
    made = Flipping(EngineConfig(kind="hf"), EngineSettings(path, "float32", MAX_MODEL_LEN, Path(), "cpu", 0))
    made.start()
    yield made
    made.close()


def publisher(engine: Flipping, ranks: Ranks, verify: str, victim: str | None) -> WeightPublisher:
    engine.sums, engine.victim = [], victim
    config = SyncConfig(bucket_mb=1, verify=verify)  # type: ignore[arg-type]
    return WeightPublisher(Wrapped(make_model(tied=True, seed=1)), ranks, engine, config)


def sent(engine: Flipping) -> set[str]:
    return {name for sums in engine.sums for name in sums}


def test_a_flipped_byte_is_refused_and_the_tensor_named(engine: Flipping, ranks: Ranks) -> None:
    with pytest.raises(SyncError, match=rf"version 3 failed in step `bucket 1`: .*{VICTIM}: checksum"):
        publisher(engine, ranks, "full", VICTIM).publish(3)


def test_full_covers_every_tensor_and_accepts_what_arrived_whole(engine: Flipping, ranks: Ranks) -> None:
    made = publisher(engine, ranks, "full", None)
    seconds = made.publish(4)
    assert sent(engine) == {shard.name for shard in made.shards}
    assert engine.version() == 4 and seconds["verify"] > 0


def test_off_sends_no_checksum_and_lets_a_flipped_byte_through(engine: Flipping, ranks: Ranks) -> None:
    publisher(engine, ranks, "off", VICTIM).publish(5)
    assert sent(engine) == set() and engine.version() == 5


def test_sampled_finds_a_byte_that_flips_every_time_exactly_once_in_16_versions(engine: Flipping, ranks: Ranks) -> None:
    made = publisher(engine, ranks, "sampled", VICTIM)
    failed = []
    for version in range(VERIFY_EVERY):
        try:
            made.publish(version)
        except SyncError as error:
            assert VICTIM in str(error)
            failed.append(version)
    assert len(failed) == 1


def test_sampled_takes_each_tensor_once_in_any_16_versions() -> None:
    for first in (0, 5, 1000):
        for position in (0, 1, 15, 16, 271):
            due = [v for v in range(first, first + 16) if verified("sampled", v, position)]
            assert len(due) == 1
    assert sum(verified("sampled", 7, position) for position in range(160)) == 10


def test_the_receiver_reads_the_weights_that_were_published(engine: Flipping, ranks: Ranks) -> None:
    made = publisher(engine, ranks, "sampled", None)
    made.publish(20)
    own = dict(engine._model.named_parameters())
    for shard in made.shards:
        assert torch.equal(own[shard.name], shard.param)
