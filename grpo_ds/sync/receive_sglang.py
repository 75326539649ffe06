"""Weight updates inside SGLang's scheduler processes: the custom weight loader `grpo_ds.sync.receive_sglang.load`.

SGLang hands a loader tensors only, so each message is JSON in a uint8 tensor:

    {"step": "begin", "names": [...]}         every tensor the update will carry
    {"step": "bucket", "bucket": {...}}       a manifest (`grpo_ds.sync.receive`)
    {"step": "finish"}                        nothing may be missing

Only SGLang's processes may import it; neither DeepSpeed nor the rest of grpo_ds is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ds.sync.receive import DTYPES, BucketReader, NameLedger


class Receiver:
    """Loads the weights of the one model that this process runs (a tensor-parallel rank's share of it)."""

    def __init__(self) -> None:
        self._reader = BucketReader()
        self._ledger: NameLedger | None = None

    def take(self, model: nn.Module, message: dict[str, Any]) -> None:
        """Do one step. Raises ValueError for what may not be loaded, and at the end for what is missing."""
        step = message["step"]
        if step == "begin":
            self._ledger = NameLedger(message["names"])
            _spoil(model)
        elif self._ledger is None:
            raise ValueError(f"step {step!r} of a weight update came before its begin")
        elif step == "bucket":
            names = [entry["name"] for entry in message["bucket"]["tensors"]]
            self._ledger.check(names)
            # SGLang copies each tensor into its parameter before the next: views are enough.
            model.load_weights(self._reader.tensors(message["bucket"]))  # type: ignore[operator]
            if next(model.parameters()).device.type != "cpu":
                # Copies from the trainer's memory may still be queued, and the answer lets it write the next bucket there.
                torch.accelerator.synchronize()
            self._ledger.arrived(names)
        elif step == "finish":
            self._ledger.require_complete()
            _require_whole(model)
            self._ledger = None
        else:
            raise ValueError(f"unknown step {step!r} of a weight update")


def _spoil(model: nn.Module) -> None:
    """Fill the parameters with NaN. SGLang only warns of names its model does not know; what stays NaN was missed."""
    for parameter in model.parameters():
        if parameter.dtype in DTYPES.values():
            parameter.data.fill_(torch.nan)


def _require_whole(model: nn.Module) -> None:
    spoilt = [name for name, p in model.named_parameters() if p.dtype in DTYPES.values() and bool(p.amax().isnan())]
    if spoilt:
        raise ValueError(
            f"{len(spoilt)} parameters of the engine's model were not reached by the weight update, or hold NaN, among "
            f"them {', '.join(spoilt[:5])}"
        )


_receiver = Receiver()


@torch.no_grad()
def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """SGLang's entry: `named_tensors` is one ("message", uint8 tensor)."""
    ((_, packed),) = named_tensors
    _receiver.take(model, json.loads(bytes(packed.tolist())))
