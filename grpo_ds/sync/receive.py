"""Reads weight buckets where the trainer put them. Imports torch and nothing of ours: it also runs in engines.

A bucket is a JSON manifest:

    {"nbytes": 1048576,                 # size of the memory that the offsets below count in, which is one of
     "path": "/proc/1234/fd/7",         #   any file; usually a memfd of the trainer
     "ipc": {...},                      #   memory of a GPU (`open_handle`)
     "group": {...},                    #   what the trainer broadcasts next in a process group (`Membership`)
     "tensors": [{"name": "model.norm.weight", "offset": 0, "dtype": "float32", "shape": [64]}, ...],
     "sums": {"model.norm.weight": 305419896}}      # optional CRC-32 of each tensor's bytes
"""

from __future__ import annotations

import base64
import math
import mmap
import os
import socket
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checksum(data: bytes | memoryview | mmap.mmap) -> int:
    """CRC-32 of a tensor's bytes, as in a manifest's "sums"."""
    return zlib.crc32(data)


def host_bytes(part: Tensor) -> memoryview:
    """The bytes of a flat uint8 tensor, without a copy where they lie in host memory."""
    return part.cpu().numpy().data


class BucketReader:
    """Finds the memory of buckets and yields views of the tensors in them."""

    def __init__(self) -> None:
        self._maps: dict[str, tuple[tuple[int, int, int], Tensor]] = {}
        self._opened: dict[str, Tensor] = {}
        self._membership: Membership | None = None

    def tensors(self, bucket: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, tensor) for each entry.

        The tensors are views of memory that the next bucket overwrites: copy what must outlive the call that was given
        the bucket, and never write to them. Raises ValueError for a tensor outside the memory, an unknown dtype or a
        wrong checksum, RuntimeError when the bytes did not come.
        """
        memory, sums = self._memory(bucket), bucket.get("sums") or {}
        nbytes = memory.numel()
        for entry in bucket["tensors"]:
            name, offset, shape = entry["name"], entry["offset"], entry["shape"]
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name}: dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
            dtype = DTYPES[entry["dtype"]]
            count = math.prod(shape)
            end = offset + count * dtype.itemsize
            if count < 1 or offset < 0 or end > nbytes or offset % dtype.itemsize:
                raise ValueError(
                    f"{name}: bytes [{offset}, {end}) of shape {shape} do not fit a bucket of {nbytes} bytes"
                )
            part = memory[offset:end]
            if name in sums and (actual := checksum(host_bytes(part))) != sums[name]:
                raise ValueError(f"{name}: checksum {actual} of what arrived is not the sent {sums[name]}")
            yield name, part.view(dtype).view(shape)

    def _memory(self, bucket: dict[str, Any]) -> Tensor:
        """The bucket's memory as a flat uint8 tensor."""
        nbytes = int(bucket["nbytes"])
        if group := bucket.get("group"):
            if self._membership is None or self._membership.id != group["id"]:
                self._membership = None  # leaves the old one first
                self._membership = Membership(group)
            return self._membership.receive(nbytes)
        if handle := bucket.get("ipc"):
            key = handle["fields"][_NAME] + str(handle["fields"]["storage_offset_bytes"])
            if key not in self._opened:
                self._opened = {key: open_handle(handle)}
            memory = self._opened[key]
            if memory.numel() != nbytes:
                raise ValueError(f"the shared GPU memory has {memory.numel()} bytes, its manifest says {nbytes}")
            return memory
        return self._map(bucket["path"], nbytes)

    def _map(self, path: str, nbytes: int) -> Tensor:
        """The file's read-only mapping; a path that means another file than before is mapped anew."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.fstat(fd)
            if stat.st_size != nbytes or nbytes == 0:
                raise ValueError(f"bucket file {path} has {stat.st_size} bytes, its manifest says {nbytes}")
            identity = (stat.st_dev, stat.st_ino, nbytes)
            known = self._maps.get(path)
            if known is None or known[0] != identity:
                # The memory of trainers that have ended lives only as long as somebody maps it.
                self._maps = {other: kept for other, kept in self._maps.items() if os.path.exists(other)}
                mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
                with warnings.catch_warnings():
                    # Read-only is intended: a receiver must not be able to change the trainer's buffer.
                    warnings.filterwarnings("ignore", message="The given buffer is not writable")
                    self._maps[path] = (identity, torch.frombuffer(mapping, dtype=torch.uint8))
            return self._maps[path][1]
        finally:
            os.close(fd)

    def close(self) -> None:
        """Drop all memory; each piece is given back as soon as no tensor looks at it."""
        self._maps.clear()
        self._opened.clear()
        self._membership = None


# ---- memory of a GPU ----

_HANDLE_FIELDS = (
    "storage_device",
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
"""What torch's `UntypedStorage._share_cuda_` returns and `_new_shared_cuda` takes, in this order."""
_NAME = "storage_handle"


def pack_handle(fields: Sequence[Any], device: str) -> dict[str, Any]:
    """The handle of a CUDA storage as JSON: bytes become base64. device: the GPU's UUID, the same in every process."""
    packed = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in zip(_HANDLE_FIELDS, fields, strict=True)
    }
    return {"device": device, "fields": packed}


def unpack_handle(handle: dict[str, Any], devices: Sequence[str]) -> tuple[Any, ...]:
    """The arguments of `_new_shared_cuda`. devices: UUIDs of the GPUs that this process sees, in its own order.

    Raises ValueError when the memory's GPU is not among them.
    """
    if handle["device"] not in devices:
        raise ValueError(
            f"the weights lie on GPU {handle['device']}, which this engine process does not see: show it all GPUs of "
            "the trainer (CUDA_VISIBLE_DEVICES), or set sync.transport to shared_memory"
        )
    fields = handle["fields"] | {"storage_device": devices.index(handle["device"])}
    return tuple(
        base64.b64decode(value) if isinstance(value, str) else value
        for value in (fields[name] for name in _HANDLE_FIELDS)
    )


def device_names() -> list[str]:
    """UUIDs of the GPUs that this process sees, in its order."""
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def open_handle(handle: dict[str, Any]) -> Tensor:
    """Another process' GPU memory as a flat uint8 tensor. Not run on a GPU yet.

    It must be another process: CUDA does not open a handle where it was made.
    """
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(*unpack_handle(handle, device_names()))
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


# ---- a process group between the trainer and one server's workers ----

_DEVICES = {"gloo": "cpu", "nccl": "cuda"}


def join_group(store: Any, rank: int, world: int, backend: str, address: str, timeout_s: float) -> Any:
    """A process group that has nothing to do with the default one. rank: of this member among `world`.

    gloo: returns when all members are there; address is this machine's. nccl: returns at once and chooses its interfaces
    itself; members meet in the first broadcast. Either way a member that dies, or does not come, breaks the broadcast
    with a RuntimeError (nccl: as read in torch's source, not run on a GPU yet; see `_without_watchdog`).
    """
    timeout = timedelta(seconds=timeout_s)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        with _without_watchdog():
            return dist.ProcessGroupNCCL(store, rank, world, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, world, options)


_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
_environment = threading.Lock()


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Has torch make NCCL groups that no watchdog looks after: whoever waits for a broadcast gets its error.

    A watchdog ends the process when a member dies. TORCH_NCCL_ASYNC_ERROR_HANDLING 2 would not do: it also raises a
    flag on which the default group's monitor ends the process minutes later. The variable is read in the constructor, so
    the trainer's other groups, which want the watchdog, keep it.
    """
    with _environment:
        before = os.environ.get(_BLOCKING)
        os.environ[_BLOCKING] = "1"
        try:
            yield
        finally:
            del os.environ[_BLOCKING]
            if before is not None:
                os.environ[_BLOCKING] = before


def broadcast(group: Any, data: Tensor, timeout_s: float) -> None:
    """Rank 0's bytes, to all members. data: flat uint8, filled on the others."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([data], options).wait(timedelta(seconds=timeout_s))


class Membership:
    """This process as a member of the group that an invitation describes; the trainer is its rank 0.

    An invitation: {"id": a name nobody else has, "address", "port": of the trainer's store, "world": members with the
    trainer, "backend": "gloo" or "nccl", "timeout_s": of every wait}.
    """

    def __init__(self, invitation: dict[str, Any]) -> None:
        """Joins. Raises RuntimeError, which names the trainer, when the members do not all come in time."""
        self.id: str = invitation["id"]
        self._timeout_s = float(invitation["timeout_s"])
        self._trainer = f"the trainer at {invitation['address']}:{invitation['port']}"
        self._device = _DEVICES[invitation["backend"]]
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        world = int(invitation["world"])
        try:
            # The trainer listens before it invites, so a refusal is final, and the store would try until the deadline.
            # Of this machine's addresses it takes the one under which the trainer reaches it.
            with socket.create_connection((invitation["address"], invitation["port"]), self._timeout_s) as probe:
                address = probe.getsockname()[0]
            timeout = timedelta(seconds=self._timeout_s)
            self._store = dist.TCPStore(
                invitation["address"], int(invitation["port"]), timeout=timeout, wait_for_workers=False
            )
            store = dist.PrefixStore(self.id, self._store)
            rank = store.add("members", 1)
            if rank < world:
                self._group = join_group(store, rank, world, invitation["backend"], address, self._timeout_s)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            raise RuntimeError(
                f"this engine process could not join the weight group of {self._trainer} within {self._timeout_s:g} s "
                f"(sync.timeout_s): {reason}"
            ) from error
        if rank >= world:
            raise RuntimeError(
                f"the weight group of {self._trainer} already has its {world - 1} engine processes: this one was "
                "started later, or the engine runs more processes than it says"
            )

    def receive(self, nbytes: int) -> Tensor:
        """The next broadcast as a flat uint8 tensor in memory that is used again and again."""
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        data = self._buffer[:nbytes]
        try:
            broadcast(self._group, data, self._timeout_s)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:300]
            raise RuntimeError(
                f"a weight bucket of {nbytes} bytes did not arrive from {self._trainer} within {self._timeout_s:g} s "
                f"(sync.timeout_s): {reason}"
            ) from error
        return data


class NameLedger:
    """Which of the expected tensors have arrived in the open update."""

    def __init__(self, expected: Sequence[str]) -> None:
        if not expected:
            raise ValueError("a weight update must list the names of the tensors it will carry")
        self._expected = frozenset(expected)
        self._missing = set(expected)
        self._offered: set[str] = set()

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError for a name that was not announced, or that came before: engines count what they load."""
        for name in names:
            if name not in self._expected:
                raise ValueError(f"tensor {name} is not in the list of names this weight update was opened with")
            if name in self._offered:
                raise ValueError(f"tensor {name} was sent twice in one weight update: begin another one")
            self._offered.add(name)

    def arrived(self, names: Iterable[str]) -> None:
        """Note that the tensors were loaded."""
        self._missing.difference_update(names)

    def require_complete(self) -> None:
        """Raises ValueError while a tensor is missing."""
        if self._missing:
            some = ", ".join(sorted(self._missing)[:5])
            raise ValueError(f"{len(self._missing)} tensors of the weight update never arrived, among them {some}")
