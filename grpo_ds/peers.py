"""Which ranks still live: asked after a collective failed, so that the error can name the lost node, or a node fell silent.

Every rank listens on a port of its own and never answers: that the kernel accepts a connection proves that the process
lives, whatever it computes. Nothing is read from the socket.

Of a node without power or network nothing is heard, not even that its connections are reset, and a collective would wait
for it until its own deadline. So the first rank of each node keeps a connection to that of the next one, over which
the kernels exchange probes; no rank has to be idle for them.

Bytes at 64 nodes x 8 ranks: ~100 B a rank at the start, and a probe of 66 B and its answer every 15 s for each node; when
something fails each of 511 ranks opens 511 connections, all at once. The first rank to notice a failure names the right
ones; one that notices later may also name ranks that have ended because of it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

PATIENCE_S = 3.0
"""Seconds in which a living peer accepts a connection; a node that lost its power says nothing at all."""
_AT_ONCE = 64
SILENCE_S = 60.0
"""A node that answers no probe for so long is lost."""
_PROBES = 4
"""So many of them, at equal distances."""


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


class Watch:
    """Calls `on_silence` with SILENCE_S, from a thread of its own, once `peer` has answered no probe for so long.

    Its end is not silence: its kernel says so, also to those who wait for it in a collective. Raises OSError when the
    peer cannot be reached now.
    """

    def __init__(self, peer: Peer, on_silence: Callable[[float], None]) -> None:
        self._connection = socket.create_connection((peer.host, peer.port), timeout=PATIENCE_S)
        self._connection.settimeout(None)
        every = max(1, round(SILENCE_S / _PROBES))
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES - 1)
        self._on_silence = on_silence
        threading.Thread(target=self._wait, name="node-watch", daemon=True).start()

    def _wait(self) -> None:
        try:
            self._connection.recv(1)
        except ConnectionError:
            return
        except OSError:  # timed out, or no way to it any more
            self._on_silence(SILENCE_S)

    def close(self) -> None:
        """Ends the watch."""
        with suppress(OSError):  # the peer may have ended it before
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def describe(lost: Sequence[Peer]) -> str:
    """`rank 3 on n2`, or `ranks 8, 9 on n2; rank 24 on n4`; whole nodes are not told from single ranks."""
    ranks_of: dict[str, list[str]] = {}
    for peer in lost:
        ranks_of.setdefault(peer.node, []).append(str(peer.rank))
    return "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {node}" for node, r in ranks_of.items())
