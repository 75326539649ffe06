"""Shared memory between the ranks of a node and their engine, with no name in any file system.

The node's leading rank makes an anonymous memory file (memfd) and everybody maps it through /proc/<pid>/fd/<n>, which
the kernel opens to processes of the same user only. When the last process ends, however it ends, the memory is gone:
there is no file in /dev/shm to clean up, and no limit of /dev/shm (64 MB in many containers) to hit.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


class Segment:
    """`nbytes` of shared memory as one uint8 tensor."""

    def __init__(self, path: str, nbytes: int, fd: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self._fd = fd
        # Pages are taken and mapped now, while an engine starts, not in the first update: that would take 3 times as long.
        self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Makes the memory."""
        fd = os.memfd_create("grpo_ds_weights", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, nbytes)
        return cls(f"/proc/{os.getpid()}/fd/{fd}", nbytes, fd)

    @classmethod
    def open(cls, path: str, nbytes: int) -> Segment:
        """Maps the memory another process made."""
        return cls(path, nbytes, os.open(path, os.O_RDWR))

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """`numel` elements at byte `offset`, as a flat tensor over the shared memory."""
        return self.bytes[offset : offset + numel * dtype.itemsize].view(dtype)

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """`nbytes` at byte `offset` for functions that know no tensors."""
        return memoryview(self._map)[offset : offset + nbytes]
