"""The parameters of a DeepSpeed module, and the part of each that this rank holds; with LoRA of the merged model.

Sizes come from `ds_numel` / `ds_shape`: under ZeRO-3 `numel()` of a partitioned parameter is 0, and whatever is sized
by it would hold the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ds.lora import LoraLinear, adapters_of, merge_slice

PREFIX = "model."
"""`TokenLogProbs` holds the Hugging Face model under this name; checkpoints and engines know the names below it."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One parameter, and the part of it that this rank holds."""

    name: str
    """Hugging Face name."""
    param: nn.Parameter
    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    """Elements of the whole tensor."""
    length: int
    """Elements of one rank's shard; the last rank's is padded."""
    adapter: LoraLinear | None = None
    """The layer whose weight this is, where it has an adapter."""

    def local(self, rank: int) -> Tensor:
        """This rank's shard, flat, `length` elements (fewer on the last rank where nothing is padded).

        With an adapter it is that of the merged weight, a new tensor, and every rank must ask for it: the adapter, not
        the weight, is put together from all ranks.
        """
        part = self._held(rank)
        if self.adapter is None:
            return part
        with whole(self.adapter.lora_A, self.adapter.lora_B) as (a, b):
            return merge_slice(part, rank * self.length, a.to(part.device), b.to(part.device), self.adapter.lora_scale)

    def _held(self, rank: int) -> Tensor:
        held = getattr(self.param, "ds_tensor", None)
        if held is not None:
            return held.detach().flatten()
        start = rank * self.length
        return self.param.detach().flatten()[start : start + self.length]

    def padded_bytes(self, rank: int) -> Tensor:
        """This rank's shard in host memory as flat uint8, `length` elements on every rank; a copy only where needed."""
        mine = self.local(rank).cpu().contiguous()
        if mine.numel() < self.length:
            mine = torch.cat([mine, mine.new_zeros(self.length - mine.numel())])
        return mine.view(torch.uint8)


@contextmanager
def whole(*params: nn.Parameter) -> Iterator[list[Tensor]]:
    """The parameters put together from all ranks, which must all come here; under ZeRO-3 only within the context."""
    partitioned: list[Any] = [param for param in params if hasattr(param, "ds_tensor")]
    if partitioned:
        partitioned[0].all_gather(param_list=partitioned)
    try:
        yield [param.detach() for param in params]
    finally:
        if partitioned:
            partitioned[0].partition(param_list=partitioned, has_been_updated=False)


def list_shards(module: nn.Module, world: int) -> list[Shard]:
    """The parameters of a DeepSpeed module in the model's order, tied weights once. Works for every ZeRO stage.

    Adapters have no place of their own: they are part of the weights that they belong to.
    """
    layers = adapters_of(module).values()
    adapted = {layer.weight: layer for layer in layers}
    inside = {param for layer in layers for param in (layer.lora_A, layer.lora_B)}
    shards = []
    for name, param in module.named_parameters():
        if param in inside:
            continue
        numel = int(getattr(param, "ds_numel", param.numel()))
        held = getattr(param, "ds_tensor", None)
        length = held.numel() if held is not None else -(-numel // world)
        shape = tuple(getattr(param, "ds_shape", param.shape))
        name = name.removeprefix(PREFIX)
        shards.append(Shard(name, param, shape, param.dtype, numel, length, adapted.get(param)))
    return shards
