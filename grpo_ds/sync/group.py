"""The trainer's end of weight groups: buckets go to engines that share no memory with it by broadcast.

Each server has a process group of its own: the node's leading rank and the server's worker processes, so that a server
that fails takes no other one with it. It is a bare ProcessGroup (gloo on CPU, NCCL on GPUs) over a TCPStore of its own
on the interface that leads to the server, independent of the trainer's groups. Members introduce themselves to the
store; nobody has to know which worker is which, because all get the same bytes. A group that failed is left behind and
the next bucket opens another one, so that nobody ever reads a broadcast that was meant for an earlier time.

The broadcast runs beside the HTTP request that announces it. A server that dies breaks that request at once, and this
ends the wait for the broadcast as well (NCCL: `join_group`). A broadcast that fails here, for lack of memory say, closes
store and group: the workers' waits break, and so the request.

Bytes, 70B bf16 (140 GB), 64 trainer nodes x 8 ranks that drive 64 servers of 8 workers on other nodes: each lead sends
140 GB to its own server, whose workers pass them on among themselves: 140 GB out of a lead's network card, 2.8 s at
400 Gb/s (90 s over gloo's one TCP connection at the 1.6 GB/s seen on loopback); nothing passes a single rank of the
job. A worker holds one bucket, the lead two on the host, with NCCL one more on its GPU for all of its servers.
"""

from __future__ import annotations

import secrets
import socket
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

from grpo_ds.engine.base import EngineError
from grpo_ds.peers import address_towards
from grpo_ds.sync.receive import broadcast, join_group

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class GroupCarrier:
    """Opens a channel to each server that asks for one; implements `grpo_ds.engine.base.Carrier`."""

    def __init__(self, memory: Tensor, device: str, timeout_s: float) -> None:
        """memory: the flat host memory that buckets are offsets into. device: kind of device the engines compute on.

        timeout_s: deadline of every wait between the two sides.
        """
        self._memory = memory
        self.device = device
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._bucket: dict[str, Any] | None = None
        self._copy: Callable[[], Tensor | None] = lambda: None
        """Of `_bucket`, for as long as a channel sends it."""

    def open(self, server: str, workers: int) -> GroupChannel:
        """A channel to the server at this URL, which has so many worker processes; they join at the first bucket."""
        return GroupChannel(self, server, workers)

    def on_device(self, bucket: dict[str, Any]) -> Tensor:
        """The bucket's bytes where the engines compute; channels that send it at the same time share them."""
        with self._lock:
            known = self._copy() if self._bucket is bucket else None
            if known is not None:
                return known
            start = bucket["start"]
            made = self._memory[start : start + bucket["nbytes"]].to(self.device)
            self._bucket, self._copy = bucket, weakref.ref(made)
            return made


class GroupChannel:
    """The way to one server's workers; implements `grpo_ds.engine.base.Channel`."""

    def __init__(self, carrier: GroupCarrier, server: str, workers: int) -> None:
        self._carrier = carrier
        self._server = server
        self._workers = workers
        self._group: Group | None = None

    @contextmanager
    def carry(self, bucket: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The manifest to tell the server while the bucket's bytes are on their way to its workers.

        bucket: a manifest without memory, with "start": its first byte in the trainer's memory. Raises EngineError
        when the workers did not take them although the server said so, and when this process could not send them.
        """
        if self._group is None:
            self._group = Group(self._server, self._workers, self._carrier.device, self._carrier.timeout_s)
        group = self._group
        told = {key: value for key, value in bucket.items() if key != "start"} | {"group": group.invitation}
        sent = _beside(lambda: group.send(lambda: self._carrier.on_device(bucket)))
        try:
            try:
                yield told
            except Exception as error:
                self._require_sent(group, error)
                raise
            self._wait(sent)
        except BaseException:
            self.close()
            raise

    def _require_sent(self, group: Group, error: Exception) -> None:
        """Raises the reason why the broadcast failed here, where it has: what the server says may follow from it."""
        if group.failure:
            raise EngineError(
                f"the trainer could not send a weight bucket to {self._server} ({self._workers} workers): "
                f"{_first_line(group.failure)}; the server: {_first_line(error)}"
            ) from group.failure

    def _wait(self, sent: Future[None]) -> None:
        """The server answered that it has loaded the bucket, so this takes no time unless it lied."""
        try:
            sent.result(self._carrier.timeout_s)
        except (RuntimeError, OSError, TimeoutError) as error:
            raise EngineError(
                f"the weight group of {self._server} ({self._workers} workers) failed or missed the deadline of "
                f"{self._carrier.timeout_s:g} s (sync.timeout_s): {_first_line(error) or 'no answer'}"
            ) from error

    def close(self) -> None:
        """Leaves the group. A broadcast under way ends, with gloo not before its deadline."""
        if self._group:
            self._group.abort()
        self._group = None


class Group:
    """A store of its own, and the process group that meets there; this process is rank 0."""

    def __init__(self, server: str, workers: int, device: str, timeout_s: float) -> None:
        """Listens for the members. Raises EngineError when there is no way to the server."""
        host = urlsplit(server).hostname
        try:
            self._address = address_towards(host or "")
            with socket.create_server((self._address, 0), family=_family(self._address)) as listener:
                port = listener.getsockname()[1]
                # The store would listen on all interfaces; it gets a socket that listens on this one.
                descriptor = listener.detach()
        except OSError as error:
            raise EngineError(f"no weight group can be opened towards {server}: {error}") from error
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(
            self._address,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
        self._timeout_s = timeout_s
        self._joined: Any = None
        self.failure: BaseException | None = None
        """Why the broadcast failed; known before the members can notice."""
        self.invitation: dict[str, Any] = {
            "id": secrets.token_hex(8),
            "address": self._address,
            "port": port,
            "world": 1 + workers,
            "backend": _BACKENDS[device],
            "timeout_s": timeout_s,
        }
        self._store: Any = dist.PrefixStore(self.invitation["id"], store)

    def send(self, data: Callable[[], Tensor]) -> None:
        """Sends the bytes to all members, after waiting for them to join where they have not yet.

        After a failure here the members' connections end, so that they do not wait for their deadline.
        """
        try:
            moved = data()
            if self._joined is None:
                world, backend = self.invitation["world"], self.invitation["backend"]
                self._joined = join_group(self._store, 0, world, backend, self._address, self._timeout_s)
            broadcast(self._joined, moved, self._timeout_s)
        except BaseException as error:
            self.failure = error
            traceback.clear_frames(error.__traceback__)  # they hold the store too
            self.abort()
            self._joined = self._store = None
            raise

    def abort(self) -> None:
        """Ends an NCCL broadcast under way, which would run on the GPU for as long as the members do not come.

        Any thread may call it: what `send` works with stays.
        """
        joined = self._joined
        if joined is not None and self.invitation["backend"] == "nccl":
            with suppress(RuntimeError):  # it could not be ended within the deadline, and nobody uses it any more
                joined.abort()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def _beside(work: Callable[[], None]) -> Future[None]:
    """Runs work in a thread that does not keep the process from ending while it waits for a dead engine."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            work()
            outcome.set_result(None)
        except BaseException as error:  # whoever waits gets it
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="weight-broadcast").start()
    return outcome
