"""The parameters of a DeepSpeed module, and the part of each that this rank holds.

Sizes come from `ds_numel` / `ds_shape`: under ZeRO-3 `numel()` of a partitioned parameter is 0, and whatever is sized
by it would hold the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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

    def local(self, rank: int) -> Tensor:
        """This rank's shard, flat, `length` elements (fewer on the last rank where nothing is padded)."""
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


def list_shards(module: nn.Module, world: int) -> list[Shard]:
    """The parameters of a DeepSpeed module in the model's order, tied weights once. Works for every ZeRO stage."""
    shards = []
    for name, param in module.named_parameters():
        numel = int(getattr(param, "ds_numel", param.numel()))
        held = getattr(param, "ds_tensor", None)
        length = held.numel() if held is not None else -(-numel // world)
        shape = tuple(getattr(param, "ds_shape", param.shape))
        shards.append(Shard(name.removeprefix(PREFIX), param, shape, param.dtype, numel, length))
    return shards
