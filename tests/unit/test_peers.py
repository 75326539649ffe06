"""A rank that is gone is named with its node; one that is only busy is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from grpo_ds import peers
from grpo_ds.peers import Answering, Peer, Watch, describe, silent

# A rank that computes all the time.
BUSY = """
import json, sys
from dataclasses import asdict
from grpo_ds import peers
kept = peers.Answering(1, on_first_node=True, one_node=True)
print(json.dumps(asdict(kept.peer)), flush=True)
while True:
    sum(range(1000))
"""


@pytest.fixture
def busy() -> Iterator[tuple[subprocess.Popen[str], Peer]]:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Peer(**json.loads(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def watching() -> threading.Thread:
    (thread,) = [t for t in threading.enumerate() if t.name == "node-watch"]
    return thread


def test_a_busy_rank_answers_until_it_is_killed(busy: tuple[subprocess.Popen[str], Peer]) -> None:
    process, peer = busy
    assert silent([peer] * 100) == []
    process.kill()
    process.wait()
    assert silent([peer]) == [peer]


def test_the_end_of_a_watched_rank_is_told_after_a_grace(
    busy: tuple[subprocess.Popen[str], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective of NCCL would wait for it for ever."""
    monkeypatch.setattr(peers, "GRACE_S", 0.5)
    process, peer = busy
    called: list[str] = []
    watch = Watch(peer, called.append)
    thread = watching()
    process.kill()
    thread.join(timeout=20)
    assert called == [f"rank 1 on {peer.node} ended 0.5 s ago without a word"]
    watch.close()


def test_a_goodbye_and_an_own_end_are_no_loss(
    busy: tuple[subprocess.Popen[str], Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    other = Answering(1, on_first_node=True, one_node=True)
    watch = Watch(other.peer, called.append)
    thread = watching()
    assert silent([other.peer]) == []
    other.close()
    thread.join(timeout=10)
    watch.close()
    assert called == [] and silent([other.peer]) == [other.peer]

    watch = Watch(busy[1], called.append)
    thread = watching()
    busy[0].kill()
    watch.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and called == [], "who leaves does not wait for the grace"


def test_many_more_may_ask_than_the_kernel_lets_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 on many kernels, where 511 ranks ask at once."""
    monkeypatch.setattr(peers, "_QUEUE", 2)
    kept = Answering(1, on_first_node=True, one_node=True)
    assert silent([kept.peer] * 300) == []
    kept.close()


def test_the_connections_of_those_who_asked_are_not_kept() -> None:
    kept = Answering(1, on_first_node=True, one_node=True)
    files = 1 + len(os.listdir("/proc/self/fd"))  # the thread may open its selector only now
    assert silent([kept.peer] * 50) == []
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > files:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept.close()


def test_a_machine_that_says_nothing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without power refuses nothing; here a full queue of connections plays its part."""
    monkeypatch.setattr(peers, "PATIENCE_S", 0.3)
    with socket.socket() as mute, socket.socket() as first, socket.socket() as second:
        mute.bind(("127.0.0.1", 0))
        mute.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(mute.getsockname())
        peer = Peer(1, "n2", *mute.getsockname())
        assert silent([peer]) == [peer]


def address(monkeypatch: pytest.MonkeyPatch, master: str, *, on_first_node: bool, one_node: bool) -> tuple[str, str]:
    """(where it listens, what it tells the others)"""
    monkeypatch.setenv("MASTER_ADDR", master)
    listener, told = peers._listen(on_first_node=on_first_node, one_node=one_node)
    with listener:
        return listener.getsockname()[0], told


def test_on_one_node_nothing_listens_beyond_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    found = address(monkeypatch, "10.0.0.1", on_first_node=True, one_node=True)
    assert found == ("127.0.0.1", "127.0.0.1")


def test_between_nodes_the_address_towards_the_first_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = address(monkeypatch, "127.0.0.5", on_first_node=False, one_node=False)
    assert told.startswith("127.0.0."), "what the kernel would send from"
    listens, told = address(monkeypatch, "127.0.0.5", on_first_node=True, one_node=False)
    assert (listens, told) == ("0.0.0.0", "127.0.0.5"), "a name that means loopback only here"


def test_where_the_master_address_is_a_services_the_first_node_tells_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 belongs to no machine; the interface on the way to it is made up here."""
    monkeypatch.setattr(peers, "address_towards", lambda host: {"192.0.2.1": "127.0.0.9"}[host])
    assert address(monkeypatch, "192.0.2.1", on_first_node=True, one_node=False) == ("127.0.0.9", "127.0.0.9")


def test_the_name_is_slurms_where_slurm_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert peers.node_name() == "n7"


def test_lost_ranks_are_told_by_node() -> None:
    lost = [Peer(8, "n2", "h", 1), Peer(9, "n2", "h", 2), Peer(24, "n4", "h", 3)]
    assert describe(lost) == "ranks 8, 9 on n2; rank 24 on n4"
