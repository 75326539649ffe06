"""Which ranks still live: asked only after a collective failed, so that the error can name the lost node.

Every rank listens on a port of its own and never answers: that the kernel accepts a connection proves that the process
lives, whatever it computes. No thread, no heartbeat, and nothing is read from the socket.

Bytes at 64 nodes x 8 ranks: ~100 B a rank at the start, and none until something fails; then each of 511 ranks opens
511 connections, all at once. The first rank to notice a failure names the right ones; one that notices later may also
name ranks that have ended because of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address

PATIENCE_S = 3.0
"""Seconds in which a living peer accepts a connection; a node that lost its power says nothing at all."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Peer:
    """Where a rank runs; travels as JSON."""

    rank: int
    node: str
    host: str
    """Address under which the other ranks reach it."""
    port: int


def node_name() -> str:
    """This machine's name, as SLURM has it where SLURM started the process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def listen(rank: int, *, on_first_node: bool, one_node: bool) -> tuple[socket.socket, Peer]:
    """The socket to keep for as long as this rank lives, and what to tell the others about it."""
    master = "127.0.0.1" if one_node else os.environ["MASTER_ADDR"]
    host = master if on_first_node else address_towards(master)
    family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    # The first node's name, which the others know it by, may mean a loopback address on that node itself.
    everywhere = on_first_node and not one_node and ip_address(address[0]).is_loopback
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind(("" if everywhere else address[0], 0))
    listener.listen(socket.SOMAXCONN)
    return listener, Peer(rank, node_name(), host, listener.getsockname()[1])


def address_towards(host: str) -> str:
    """The address under which `host` reaches this machine: that of the interface on the way there.

    Nothing is sent. Raises OSError when the host has no address or there is no way to it.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def silent(peers: Sequence[Peer]) -> list[Peer]:
    """Those that accept no connection within PATIENCE_S; takes about that long at most for _AT_ONCE of them."""

    def answers(peer: Peer) -> bool:
        try:
            socket.create_connection((peer.host, peer.port), timeout=PATIENCE_S).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [peer for peer, lives in zip(peers, pool.map(answers, peers), strict=True) if not lives]


def describe(lost: Sequence[Peer]) -> str:
    """`rank 3 on n2`, or `ranks 8, 9 on n2; rank 24 on n4`; whole nodes are not told from single ranks."""
    ranks_of: dict[str, list[str]] = {}
    for peer in lost:
        ranks_of.setdefault(peer.node, []).append(str(peer.rank))
    return "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {node}" for node, r in ranks_of.items())
