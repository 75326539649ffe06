"""Reads weight buckets out of a shared file. Imports torch and the standard library only: it also runs inside engines.

A bucket is a JSON manifest:

    {"path": "/proc/1234/fd/7",         # any file; usually a memfd of the trainer
     "nbytes": 1048576,                 # size of the file
     "tensors": [{"name": "model.norm.weight", "offset": 0, "dtype": "float32", "shape": [64]}, ...],
     "sums": {"model.norm.weight": 305419896}}      # optional CRC-32 of each tensor's bytes
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checksum(data: bytes | memoryview | mmap.mmap) -> int:
    """CRC-32 of a tensor's bytes, as in a manifest's "sums"."""
    return zlib.crc32(data)


class BucketReader:
    """Maps bucket files, each once, and yields views of the tensors in them."""

    def __init__(self) -> None:
        self._maps: dict[str, tuple[tuple[int, int, int], mmap.mmap]] = {}

    def _map(self, path: str, nbytes: int) -> mmap.mmap:
        """The file's read-only mapping; a path that means another file than before is mapped anew."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.fstat(fd)
            if stat.st_size != nbytes or nbytes == 0:
                raise ValueError(f"bucket file {path} has {stat.st_size} bytes, its manifest says {nbytes}")
            identity = (stat.st_dev, stat.st_ino, nbytes)
            known = self._maps.get(path)
            if known is None or known[0] != identity:
                self._maps[path] = (identity, mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ))
            return self._maps[path][1]
        finally:
            os.close(fd)

    def tensors(self, bucket: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, CPU tensor) for each entry.

        The tensors are views of the shared file: copy what must outlive the call that was given the bucket, and never
        write to them. Raises ValueError for a tensor outside the file, an unknown dtype or a wrong checksum.
        """
        path, nbytes = bucket["path"], bucket["nbytes"]
        mapping = self._map(path, nbytes)
        sums = bucket.get("sums") or {}
        for entry in bucket["tensors"]:
            name, offset, shape = entry["name"], entry["offset"], entry["shape"]
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name}: dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
            dtype = DTYPES[entry["dtype"]]
            count = math.prod(shape)
            end = offset + count * dtype.itemsize
            if count < 1 or offset < 0 or end > nbytes or offset % dtype.itemsize:
                raise ValueError(
                    f"{name}: bytes [{offset}, {end}) of shape {shape} do not fit {path} of {nbytes} bytes"
                )
            if name in sums:
                with memoryview(mapping) as whole, whole[offset:end] as part:
                    actual = checksum(part)
                if actual != sums[name]:
                    raise ValueError(f"{name}: checksum {actual} of what arrived is not the sent {sums[name]}")
            yield name, _view(mapping, dtype, count, offset).view(shape)

    def close(self) -> None:
        """Drop all mappings; each is unmapped as soon as no tensor looks at it."""
        self._maps.clear()


def _view(mapping: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
    with warnings.catch_warnings():
        # Read-only is intended: a receiver must not be able to change the trainer's buffer.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)


class NameLedger:
    """Which of the expected tensors have arrived in the open update."""

    def __init__(self, expected: Sequence[str]) -> None:
        if not expected:
            raise ValueError("a weight update must list the names of the tensors it will carry")
        self._expected = frozenset(expected)
        self._missing = set(expected)

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError for a name that was not announced."""
        for name in names:
            if name not in self._expected:
                raise ValueError(f"tensor {name} is not in the list of names this weight update was opened with")

    def arrived(self, names: Iterable[str]) -> None:
        """Note that the tensors were loaded."""
        self._missing.difference_update(names)

    def require_complete(self) -> None:
        """Raises ValueError while a tensor is missing."""
        if self._missing:
            some = ", ".join(sorted(self._missing)[:5])
            raise ValueError(f"{len(self._missing)} tensors of the weight update never arrived, among them {some}")
