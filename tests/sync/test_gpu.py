"""GPU memory between processes, on a real GPU. Not run yet: no machine of the project has had one at the time of writing."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from grpo_ds.sync.receive import BucketReader, checksum, host_bytes
from grpo_ds.sync.segment import DeviceSegment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def _engine(end: Connection) -> None:
    """Reads each manifest it is sent and answers what the tensors hold, and where they lie."""
    reader = BucketReader()
    while (manifest := end.recv()) is not None:
        try:
            answer: Any = [(name, t.device.type, t.float().sum().item()) for name, t in reader.tensors(manifest)]
        except ValueError as error:
            answer = str(error)
        end.send(answer)


def manifest(segment: DeviceSegment, offset: int, numel: int) -> dict[str, Any]:
    part = segment.bytes[offset : offset + 2 * numel]
    entry = {"name": "w", "offset": offset, "dtype": "bfloat16", "shape": [numel]}
    sums = {"w": checksum(host_bytes(part))}
    return {segment.key: segment.where, "nbytes": segment.nbytes, "tensors": [entry], "sums": sums}


def test_another_process_reads_a_bucket_in_gpu_memory_and_what_is_written_there_later() -> None:
    segment = DeviceSegment.create(2**22)
    ours, theirs = multiprocessing.Pipe()
    engine = multiprocessing.get_context("spawn").Process(target=_engine, args=(theirs,), daemon=True)
    engine.start()
    try:
        for offset, value in ((0, 1.0), (2**21, -2.0), (0, 3.0)):
            segment.view(offset, 1024, torch.bfloat16).fill_(value)
            segment.settle()
            ours.send(manifest(segment, offset, 1024))
            assert ours.poll(120), "the other process did not answer within 120 s"
            assert ours.recv() == [("w", "cuda", 1024 * value)]
        spoilt = manifest(segment, 0, 1024)
        segment.view(0, 1, torch.bfloat16).fill_(9.0)
        segment.settle()
        ours.send(spoilt)
        assert ours.poll(120)
        assert "checksum" in ours.recv()
        ours.send(None)
        engine.join(60)
        assert engine.exitcode == 0
    finally:
        engine.kill()
        engine.join()
