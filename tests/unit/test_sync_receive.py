"""What an engine's receiver keeps account of, and when it answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

from grpo_ds.sync.receive import NameLedger
from grpo_ds.sync.receive_sglang import Receiver


def test_a_tensor_that_comes_twice_is_refused_because_engines_count_what_they_load() -> None:
    ledger = NameLedger(["q", "k"])
    ledger.check(["q"])
    with pytest.raises(ValueError, match="tensor q was sent twice in one weight update"):
        ledger.check(["k", "q"])
    with pytest.raises(ValueError, match="tensor k was sent twice"):
        NameLedger(["q", "k"]).check(["k", "k"])


class Device(nn.Module):
    """A model on a device that copies in the background; notes what happened in which order."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, device=kind))
        self.seen: list[str] = []

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.seen += [name for name, _ in tensors]


@pytest.fixture
def path() -> Iterator[str]:
    fd = os.memfd_create("test_bucket")
    os.ftruncate(fd, 8)
    yield f"/proc/{os.getpid()}/fd/{fd}"
    os.close(fd)


@pytest.mark.parametrize(("kind", "order"), [("cpu", ["weight"]), ("meta", ["weight", "synchronized"])])
def test_a_bucket_is_answered_when_the_device_has_copied_it(
    path: str, kind: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """meta stands for any device but the CPU: until then the trainer's memory is still being read."""
    model, receiver = Device(kind), Receiver()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: model.seen.append("synchronized"))
    entry = {"name": "weight", "offset": 0, "dtype": "float32", "shape": [2]}
    receiver.take(model, {"step": "begin", "names": ["weight"]})
    receiver.take(model, {"step": "bucket", "bucket": {"path": path, "nbytes": 8, "tensors": [entry]}})
    assert model.seen == order
