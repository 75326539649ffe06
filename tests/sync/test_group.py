"""Publications through a process group to real vLLM servers: two tensor-parallel workers, and one that is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from grpo_ds.config import SyncConfig
from grpo_ds.dist import Ranks
from grpo_ds.sync.group import GroupCarrier
from grpo_ds.sync.publish import SyncError, WeightPublisher
from tests.engine.bench import Bench, make_model, new_server
from tests.engine.test_update import assert_engine_is_policy, perturb
from tests.models import save_model
from tests.sync.test_verify import Wrapped

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """An untied model on a server of two tensor-parallel workers."""
    folder, model = tmp_path_factory.mktemp("group"), make_model(tied=False)
    engine = new_server("vllm", save_model(model, folder / "model"), folder, args={"tensor_parallel_size": 2})
    engine.start()
    try:
        engine.wait_ready()
        yield Bench(engine, model)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def publisher(bench: Bench, ranks: Ranks) -> Iterator[WeightPublisher]:
    # Buckets of one module each: the memory is used again and again.
    config = SyncConfig(bucket_mb=0, verify="full", timeout_s=120)
    made = WeightPublisher(Wrapped(bench.model), ranks, bench.engine, config, "group")
    yield made
    made.close()


def test_both_workers_of_a_server_hold_every_new_policy(bench: Bench, publisher: WeightPublisher) -> None:
    assert len(publisher.buckets) > 5
    for version in (1, 2, 3):
        perturb(bench.model, version)
        publisher.publish(version)
        assert_engine_is_policy(bench, version)


@pytest.mark.parametrize(
    ("said", "reason"), [(1, "already has its 1 engine processes: this one was"), (3, "could not join .* within 5 s")]
)
def test_a_server_with_another_number_of_workers_than_it_says_is_refused_in_time_and_can_be_repaired(
    said: int, reason: str, bench: Bench, publisher: WeightPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = bench.engine
    with monkeypatch.context() as lie:
        lie.setattr(publisher, "_carrier", GroupCarrier(publisher.segment.bytes, "cpu", 5.0))
        lie.setattr(engine, "_workers", lambda: said)
        started = time.monotonic()
        with pytest.raises(SyncError, match=rf"(?s)version 7 failed in step `bucket 1`: EngineError: .*{reason}"):
            publisher.publish(7)
        assert time.monotonic() - started < 30
    perturb(bench.model, 8)
    publisher.publish(8)
    assert_engine_is_policy(bench, 8)


def test_a_worker_killed_in_the_middle_of_a_bucket_ends_the_publication_at_once(
    bench: Bench, publisher: WeightPublisher
) -> None:
    engine: Any = bench.engine
    url = engine.url
    worker = workers_of(engine)[-1]
    load, at = engine._load, [0.0]

    def stopped(bucket: dict[str, Any]) -> None:
        """From the second bucket on the worker does not take its bytes; a moment later it is dead."""
        if publisher.buckets[0].items[0].shard.name not in {entry["name"] for entry in bucket["tensors"]}:
            worker.suspend()
            threading.Timer(0.5, kill).start()
        load(bucket)

    def kill() -> None:
        at[0] = time.monotonic()
        worker.kill()

    engine._load = stopped
    try:
        with pytest.raises(SyncError) as raised:
            publisher.publish(4)
    finally:
        engine._load = load
    seconds = time.monotonic() - at[0]
    message = str(raised.value)
    assert message.startswith("publishing policy version 4 failed in step `bucket 2`: EngineError: ")
    assert f"{url}/update_weights" in message
    assert seconds < 20


def workers_of(engine: Any) -> list[psutil.Process]:
    """The processes of a server that hold weights."""
    guard = psutil.Process(engine._server.process.pid)
    found = [p for p in guard.children(recursive=True) if "Worker" in p.name() or "Worker" in " ".join(p.cmdline())]
    assert len(found) == 2, [(p.name(), p.cmdline()) for p in guard.children(recursive=True)]
    return found
