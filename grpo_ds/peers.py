"""Which ranks still live: asked after a collective failed, so that the error can name the lost node, or a node fell silent.

Every rank listens on a port of its own: that the kernel accepts a connection proves that the process lives, whatever it
computes. A thread takes the connections out of the kernel's queue, which may hold 128 only, and keeps each one until the
other side closes it. Nothing is read from them.

Of a node without power or network nothing is heard, not even that its connections are reset, and a collective would wait
for it until its own deadline. So the first rank of each node keeps a connection to that of the next one, over which
the kernels exchange probes; no rank has to be idle for them. A collective of NCCL does not notice the end of a process
either, so a connection that ends without a goodbye counts as well, a while after gloo's collectives had their chance.

Bytes at 64 nodes x 8 ranks: ~100 B a rank at the start, and a probe of 66 B and its answer every 15 s for each node; when
something fails each of 511 ranks opens 511 connections, all at once. The first rank to notice a failure names the right
ones; one that notices later may also name ranks that have ended because of it.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
import time
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
GRACE_S = 30.0
"""From the end of a connection to the end of its watcher: the peer's own cause, or a collective's, comes first."""
_GOODBYE = b"."
_QUEUE = 1024
"""Connections that the kernel may hold for the thread that takes them; many kernels allow 128 only."""


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


class Answering:
    """This rank's port, answered from a thread of its own for as long as the rank lives. Raises OSError at the start."""

    def __init__(self, rank: int, *, on_first_node: bool, one_node: bool) -> None:
        self._listener, host = _listen(on_first_node=on_first_node, one_node=one_node)
        self.peer = Peer(rank, node_name(), host, self._listener.getsockname()[1])
        """What to tell the others."""
        self._end, self._told = socket.socketpair()
        self._thread = threading.Thread(target=self._answer, name="answers-peers", daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        with selectors.DefaultSelector() as waiting, self._listener, self._told:
            waiting.register(self._listener, selectors.EVENT_READ)
            waiting.register(self._told, selectors.EVENT_READ)
            while True:
                for key, _ in waiting.select():
                    if key.fileobj is self._told:
                        self._part(waiting)
                        return
                    if key.fileobj is self._listener:
                        try:
                            asker, _ = self._listener.accept()
                        except OSError:  # this process has all its files open; the queue holds who asks now
                            time.sleep(0.1)
                            continue
                        waiting.register(asker, selectors.EVENT_READ)
                    else:  # the other side has closed it, or its node is gone
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]

    def _part(self, waiting: selectors.BaseSelector) -> None:
        for key in list(waiting.get_map().values()):
            if isinstance(key.fileobj, socket.socket) and key.fileobj not in (self._listener, self._told):
                with key.fileobj as asker, suppress(OSError):  # it may have gone before
                    asker.send(_GOODBYE)

    def close(self) -> None:
        """Says goodbye to those who watch this rank, and answers nobody any more."""
        self._end.close()
        self._thread.join(timeout=10)


def _listen(*, on_first_node: bool, one_node: bool) -> tuple[socket.socket, str]:
    """(listening socket, address under which the others reach it)"""
    master = "127.0.0.1" if one_node else os.environ["MASTER_ADDR"]
    if on_first_node:
        try:
            return _bound(master, on_first_node and not one_node), master
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # A service's address, or one that is translated on the way: this node is reached as the others are.
    host = address_towards(master)
    return _bound(host, False), host


def _bound(host: str, maybe_everywhere: bool) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    # The first node's name, which the others know it by, may mean a loopback address on that node itself.
    everywhere = maybe_everywhere and ip_address(address[0]).is_loopback
    listener = socket.socket(family, socket.SOCK_STREAM)
    _probe(listener)  # the connections inherit it
    try:
        listener.bind(("" if everywhere else address[0], 0))
        listener.listen(_QUEUE)
    except OSError:
        listener.close()
        raise
    return listener


def _probe(connection: socket.socket) -> None:
    """Has the kernel end it once the other side has answered no probe for SILENCE_S."""
    every = max(1, round(SILENCE_S / _PROBES))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES - 1)


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
    """Calls `on_silence` with what happened, from a thread of its own, once `peer` is gone without a goodbye.

    That is SILENCE_S after the last sign of its node, or GRACE_S after the end of its process. Raises OSError when the
    peer cannot be reached now.
    """

    def __init__(self, peer: Peer, on_silence: Callable[[str], None]) -> None:
        self._connection = socket.create_connection((peer.host, peer.port), timeout=PATIENCE_S)
        self._connection.settimeout(None)
        _probe(self._connection)
        self._peer = peer
        self._on_silence = on_silence
        self._closed = threading.Event()
        threading.Thread(target=self._wait, name="node-watch", daemon=True).start()

    def _wait(self) -> None:
        try:
            with suppress(ConnectionError):  # reset: the process has ended, as with nothing to read
                if self._connection.recv(1) == _GOODBYE:
                    return
        except OSError:  # timed out, or no way to it any more
            if not self._closed.is_set():
                self._on_silence(f"a node said nothing for {SILENCE_S:g} s")
            return
        if not self._closed.wait(GRACE_S):
            self._on_silence(f"{describe([self._peer])} ended {GRACE_S:g} s ago without a word")

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        with suppress(OSError):  # the peer may have ended it before
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def describe(lost: Sequence[Peer]) -> str:
    """`rank 3 on n2`, or `ranks 8, 9 on n2; rank 24 on n4`; whole nodes are not told from single ranks."""
    ranks_of: dict[str, list[str]] = {}
    for peer in lost:
        ranks_of.setdefault(peer.node, []).append(str(peer.rank))
    return "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {node}" for node, r in ranks_of.items())
