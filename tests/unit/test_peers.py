"""A rank that is gone is named with its node; one that is only busy is not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading

import pytest

from grpo_ds import peers
from grpo_ds.peers import Peer, Watch, describe, listen, silent

# A rank that lives and never comes to accept anything.
BUSY = """
import json, sys, time
from dataclasses import asdict
from grpo_ds.peers import listen
kept, peer = listen(1, on_first_node=True, one_node=True)
print(json.dumps(asdict(peer)), flush=True)
time.sleep(600)
"""


def test_a_busy_rank_answers_until_it_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        peer = Peer(**json.loads(process.stdout.readline()))
        assert silent([peer] * 100) == [], "asked by many, accepting none"
        process.kill()
        process.wait()
        assert silent([peer]) == [peer]
    finally:
        process.kill()
        process.wait()


def test_the_end_of_a_watched_rank_is_no_silence() -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    called: list[float] = []
    try:
        assert process.stdout is not None
        watch = Watch(Peer(**json.loads(process.stdout.readline())), called.append)
        (thread,) = [t for t in threading.enumerate() if t.name == "node-watch"]
    finally:
        process.kill()
        process.wait()
    thread.join(timeout=10)
    assert not thread.is_alive() and called == []
    watch.close()


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


def test_on_one_node_nothing_listens_beyond_loopback() -> None:
    kept, peer = listen(0, on_first_node=True, one_node=True)
    with kept:
        assert kept.getsockname() == ("127.0.0.1", peer.port) == (peer.host, peer.port)


def test_between_nodes_the_address_towards_the_first_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.5")
    kept, peer = listen(8, on_first_node=False, one_node=False)
    with kept:
        assert peer.host.startswith("127.0.0."), "what the kernel would send from"
    kept, peer = listen(0, on_first_node=True, one_node=False)
    with kept:
        assert peer.host == "127.0.0.5" and kept.getsockname()[0] == "0.0.0.0", "a name that means loopback only here"


def test_the_name_is_slurms_where_slurm_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert peers.node_name() == "n7"


def test_lost_ranks_are_told_by_node() -> None:
    lost = [Peer(8, "n2", "h", 1), Peer(9, "n2", "h", 2), Peer(24, "n4", "h", 3)]
    assert describe(lost) == "ranks 8, 9 on n2; rank 24 on n4"
