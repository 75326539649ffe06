"""Memory that the ranks of a node share with each other, and with their engine where it is near enough.

`Segment` is host memory with no name in any file system: the node's leading rank makes an anonymous memory file (memfd)
and everybody maps it through /proc/<pid>/fd/<n>, which the kernel opens to processes of the same user only. When the
last process ends, however it ends, the memory is gone: there is no file in /dev/shm to clean up, and no limit of
/dev/shm (64 MB in many containers) to hit.

`DeviceSegment` is the same in a GPU's memory. Which of the two it is does not matter to anybody else.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from grpo_ds.sync.receive import device_names, open_handle, pack_handle


class _Memory:
    """`nbytes` bytes as one flat uint8 tensor."""

    key: ClassVar[str]
    """Under which a bucket's manifest says where the memory is."""

    def __init__(self, where: Any, memory: Tensor) -> None:
        self.where = where
        """What another process needs in order to open it; JSON."""
        self.bytes = memory
        self.nbytes = memory.numel()

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """`numel` elements at byte `offset`, as a flat tensor over the shared memory."""
        return self.bytes[offset : offset + numel * dtype.itemsize].view(dtype)


class Segment(_Memory):
    """Shared host memory."""

    key = "path"

    @classmethod
    def create(cls, nbytes: int) -> Self:
        """Makes the memory."""
        fd = os.memfd_create("grpo_ds_weights", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, nbytes)
        return cls._map(f"/proc/{os.getpid()}/fd/{fd}", nbytes, fd)  # stays open: the path is this descriptor

    @classmethod
    def open(cls, where: str, nbytes: int) -> Self:
        """Maps the memory another process made."""
        return cls._map(where, nbytes, os.open(where, os.O_RDWR))

    @classmethod
    def _map(cls, where: str, nbytes: int, fd: int) -> Self:
        # Pages are taken and mapped now, while an engine starts, not in the first update: that would take 3 times as long.
        mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return cls(where, torch.frombuffer(mapping, dtype=torch.uint8))

    def settle(self) -> None:
        """Returns when what this process wrote is there for all others."""


class DeviceSegment(_Memory):
    """A GPU's memory, which other processes of the node open by its CUDA IPC handle. Not run on a GPU yet."""

    key = "ipc"

    @classmethod
    def create(cls, nbytes: int) -> Self:
        """Makes the memory, on this process' current GPU."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        fields = memory.untyped_storage()._share_cuda_()
        return cls(pack_handle(fields, device_names()[memory.get_device()]), memory)

    @classmethod
    def open(cls, where: dict[str, Any], nbytes: int) -> Self:
        """Maps the memory another process made."""
        return cls(where, open_handle(where)[:nbytes])

    def settle(self) -> None:
        """As in `Segment`; a copy to a GPU goes on in the background."""
        torch.accelerator.synchronize()
