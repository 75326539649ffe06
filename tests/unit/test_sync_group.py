"""Weight groups between a trainer and the workers of an engine, over real sockets: what arrives, and what ends a wait."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_ds.engine.base import EngineError
from grpo_ds.peers import address_towards
from grpo_ds.sync import receive
from grpo_ds.sync.group import GroupCarrier, GroupChannel
from grpo_ds.sync.receive import BucketReader, Membership, checksum

SERVER = "http://127.0.0.1:1"
"""Nobody asks it anything here: a test passes the manifests on itself."""


def memory() -> torch.Tensor:
    return torch.arange(64, dtype=torch.float32).view(torch.uint8)


def bucket(start: int, count: int) -> dict[str, Any]:
    """`count` numbers from byte `start` on, as one tensor."""
    data = bytes(memory().numpy())[start : start + 4 * count]
    entry = {"name": "w", "offset": 0, "dtype": "float32", "shape": [count]}
    return {"start": start, "nbytes": 4 * count, "tensors": [entry], "sums": {"w": checksum(data)}}


def channel(workers: int = 1, timeout_s: float = 30.0, server: str = SERVER) -> GroupChannel:
    return GroupCarrier(memory(), "cpu", timeout_s).open(server, workers)


def read(reader: BucketReader, manifest: dict[str, Any]) -> list[float]:
    ((_, tensor),) = reader.tensors(manifest)
    return list(tensor.tolist())


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_every_worker_gets_each_bucket_and_stays_in_the_group(threads: ThreadPoolExecutor) -> None:
    sender, readers = channel(workers=2), [BucketReader(), BucketReader()]
    ids = set()
    for start, count in ((0, 8), (128, 32), (64, 3)):
        with sender.carry(bucket(start, count)) as told:
            ids.add(told["group"]["id"])
            got = list(threads.map(read, readers, [told, told]))
        assert got == 2 * [[start / 4 + i for i in range(count)]]
    assert len(ids) == 1


def test_nothing_listens_beyond_the_interface_that_leads_to_the_server(threads: ThreadPoolExecutor) -> None:
    sender = channel()
    with sender.carry(bucket(0, 4)) as told:
        port = told["group"]["port"]
        assert told["group"]["address"] == "127.0.0.1"
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(OSError), socket.create_connection((own_address(), port), timeout=5):
            pass
        read(BucketReader(), told)


def own_address() -> str:
    """Another address of this machine than 127.0.0.1; all of 127.0.0.0/8 is loopback."""
    return "127.0.0.2"


def test_checksums_are_taken_of_what_arrived(threads: ThreadPoolExecutor) -> None:
    sender, wrong = channel(), bucket(0, 4)
    wrong["sums"]["w"] += 1
    with pytest.raises(ValueError, match="w: checksum"), sender.carry(wrong) as told:
        read(BucketReader(), told)


def test_after_a_failure_the_next_bucket_goes_through_a_new_group(threads: ThreadPoolExecutor) -> None:
    sender, reader = channel(), BucketReader()
    with sender.carry(bucket(0, 4)) as told:
        read(reader, told)
    first = told["group"]["id"]
    # A server that refuses a bucket before it reads it: the broadcast is never taken.
    with pytest.raises(EngineError, match="refused"), sender.carry(bucket(0, 4)):
        raise EngineError("refused")
    with sender.carry(bucket(64, 4)) as told:
        assert read(reader, told) == [16.0, 17.0, 18.0, 19.0]
    assert told["group"]["id"] != first


def test_a_process_that_was_started_later_is_told_so_at_once() -> None:
    sender = channel(timeout_s=30)
    with sender.carry(bucket(0, 4)) as told:
        read(BucketReader(), told)
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"127\.0\.0\.1:\d+ already has its 1 engine processes: this one was started"
    ):
        Membership(told["group"])
    assert time.monotonic() - started < 10


def test_a_member_that_does_not_come_ends_the_wait_of_both_sides_with_their_names() -> None:
    sender = channel(workers=2, timeout_s=2)
    started = time.monotonic()
    with (
        pytest.raises(
            RuntimeError, match=r"could not join the weight group of the trainer at 127\.0\.0\.1:\d+ within 2 s"
        ),
        sender.carry(bucket(0, 4)) as told,
    ):
        read(BucketReader(), told)
    with (
        pytest.raises(
            EngineError, match=r"weight group of http://127\.0\.0\.1:1 \(2 workers\) .* 2 s \(sync.timeout_s\)"
        ),
        sender.carry(bucket(0, 4)),
    ):
        pass  # the server says it has the bucket, and nobody ever came for it
    assert time.monotonic() - started < 30


def test_a_port_where_nobody_listens_is_named_within_the_deadline() -> None:
    sender = channel(timeout_s=2)
    with suppress(EngineError), sender.carry(bucket(0, 4)) as told:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            invitation = told["group"] | {"port": probe.getsockname()[1]}
        with pytest.raises(RuntimeError, match=rf"trainer at 127\.0\.0\.1:{invitation['port']} within 2 s"):
            Membership(invitation)


def _die_in_the_middle(told: dict[str, Any]) -> None:
    Membership(told["group"])
    os.kill(os.getpid(), 9)


def test_a_worker_that_is_killed_in_the_middle_does_not_hold_the_trainer(threads: ThreadPoolExecutor) -> None:
    sender = channel(timeout_s=60)
    started = time.monotonic()
    with pytest.raises(EngineError, match="connection was reset"), sender.carry(bucket(0, 4)) as told:
        worker = multiprocessing.get_context("spawn").Process(target=_die_in_the_middle, args=(told,))
        worker.start()
        worker.join(45)
        assert worker.exitcode == -9
        raise EngineError("connection was reset")  # what the server's HTTP connection then says
    assert time.monotonic() - started < 50


class Full(GroupCarrier):
    """Of a trainer whose GPU has no room for the bucket from byte `at` on."""

    at = 0

    def on_device(self, bucket: dict[str, Any]) -> torch.Tensor:
        if bucket["start"] == self.at:
            raise RuntimeError("CUDA out of memory.\nMore about it")
        return super().on_device(bucket)


@pytest.mark.parametrize("at", [0, 64], ids=["before the workers have joined", "when they wait for the second bucket"])
def test_the_trainers_own_failure_ends_the_workers_wait_at_once_and_is_told(at: int) -> None:
    carrier = Full(memory(), "cpu", timeout_s=60.0)
    carrier.at = at
    sender, reader = carrier.open(SERVER, 1), BucketReader()
    if at:
        with sender.carry(bucket(0, 4)) as told:
            read(reader, told)
    started = time.monotonic()
    wanted = (
        r"the trainer could not send a weight bucket to http://127\.0\.0\.1:1 \(1 workers\): CUDA out of memory\.; "
    )
    with pytest.raises(EngineError, match=wanted) as failure, sender.carry(bucket(at, 4)) as told:
        read(reader, told)
    assert time.monotonic() - started < 20
    assert str(failure.value.__cause__).startswith("CUDA out of memory")
    carrier.at = -1
    with sender.carry(bucket(at, 4)) as told:
        assert read(reader, told) == [at / 4 + k for k in range(4)]


def test_servers_that_get_a_bucket_at_the_same_time_share_its_copy() -> None:
    carrier, first = GroupCarrier(memory(), "cpu", 1.0), bucket(0, 4)
    one = carrier.on_device(first)
    assert carrier.on_device(first) is one
    other = carrier.on_device(bucket(0, 4))
    assert other is not one, "the next bucket in the same memory"
    del one, other
    assert carrier._copy() is None, "nothing is kept between publications"


@pytest.mark.parametrize("before", [None, "0"])
@pytest.mark.parametrize("fails", [False, True])
def test_groups_over_nccl_have_no_watchdog_and_the_trainers_others_keep_theirs(
    before: str | None, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch reads in the constructor; that it acts on it was not run on a GPU."""
    name, seen = "TORCH_NCCL_BLOCKING_WAIT", list[Any]()

    class Group:
        Options = SimpleNamespace

        def __init__(self, store: Any, rank: int, world: int, options: Any) -> None:
            seen.append((os.environ.get(name), options._timeout.total_seconds()))
            if fails:
                raise RuntimeError("no GPUs found")

    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    monkeypatch.setattr(receive.dist, "ProcessGroupNCCL", Group, raising=False)
    with pytest.raises(RuntimeError, match="no GPUs") if fails else nullcontext():
        receive.join_group(None, 0, 2, "nccl", "127.0.0.1", 7.0)
    assert seen == [("1", 7.0)]
    assert os.environ.get(name) == before


def test_a_server_without_an_address_is_named() -> None:
    sender = channel(server="http://no-such-host.invalid:80")
    wanted = r"no weight group can be opened towards http://no-such-host\.invalid:80"
    with pytest.raises(EngineError, match=wanted), sender.carry(bucket(0, 4)):
        pass


def test_the_address_towards_this_machine_is_its_own() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
