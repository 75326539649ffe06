"""Samples of one micro-batch -> tensors. The shift from a token to the position that predicts it happens here, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from grpo_ds.batching.plan import Layout
from grpo_ds.types import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward/backward pass of one rank: B rows of L positions, M response tokens."""

    input_ids: Tensor
    """(B, L) int64."""
    position_ids: Tensor
    """(B, L) int64, from 0 in each sequence."""
    attention_mask: Tensor | None
    """(B, L) int64, 0 on padding; None in the packed layout, where position_ids restart at each sequence."""
    predictor: Tensor
    """(M,) int64: flat index into B*L of the position that predicts response token m."""
    targets: Tensor
    """(M,) int64: the response tokens."""
    sequence_index: Tensor
    """(M,) int64, non-decreasing from 0: which sequence of the micro-batch token m belongs to."""
    rollout_logprobs: Tensor
    """(M,) float32."""
    advantages: Tensor
    """(M,) float32."""
    versions: Tensor
    """(M,) int64."""

    def to(self, device: str | torch.device) -> MicroBatch:
        """The same micro-batch on another device."""
        return replace(self, **{f.name: v.to(device) for f in fields(self) if (v := getattr(self, f.name)) is not None})


def _check(sample: Sample) -> None:
    length = sample.token_ids.numel()
    for name in ("response_mask", "rollout_logprobs", "advantages", "versions"):
        if getattr(sample, name).shape != (length,):
            raise ValueError(
                f"prompt {sample.prompt_index}: {name} has shape {tuple(getattr(sample, name).shape)}, "
                f"token_ids has {length} tokens: every per-token array has the length of token_ids"
            )
    if length and bool(sample.response_mask[0]):
        raise ValueError(
            f"prompt {sample.prompt_index}: the first token cannot be a response token: nothing predicts it"
        )


def _dummy() -> Sample:
    """Two tokens and no response: a rank without work still runs the same forward and backward passes."""
    two = torch.zeros(2)
    return Sample(-1, two.long(), two.bool(), two, two, two.long() - 1)


def collate(samples: Sequence[Sample], layout: Layout, pad_id: int = 0) -> MicroBatch:
    """Puts samples into one micro-batch; an empty list gives one without response tokens (M = 0)."""
    samples = list(samples) or [_dummy()]
    for sample in samples:
        _check(sample)
    lengths = [s.token_ids.numel() for s in samples]
    width = max(lengths)
    starts = [i * width for i in range(len(samples))]
    if layout == "packed":
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    size = len(samples) * width if layout == "padded" else sum(lengths)
    input_ids = torch.full((size,), pad_id)
    position_ids = torch.zeros(size, dtype=torch.int64)
    mask = torch.zeros(size, dtype=torch.int64)
    predictor, index = [], []
    for i, (sample, start, length) in enumerate(zip(samples, starts, lengths, strict=True)):
        input_ids[start : start + length] = sample.token_ids
        position_ids[start : start + length] = torch.arange(length)
        mask[start : start + length] = 1
        where = sample.response_mask.nonzero().squeeze(1)
        predictor.append(start + where - 1)
        index.append(torch.full_like(where, i))
    sequence_index = torch.cat(index)
    # Sequences without a response token vanish from the numbering, so that it counts what the loss sees.
    sequence_index = torch.unique_consecutive(sequence_index, return_inverse=True)[1]
    rows = (len(samples), width) if layout == "padded" else (1, size)

    def tokens(name: str) -> Tensor:
        return torch.cat([getattr(s, name)[s.response_mask] for s in samples])

    return MicroBatch(
        input_ids=input_ids.view(rows),
        position_ids=position_ids.view(rows),
        attention_mask=mask.view(rows) if layout == "padded" else None,
        predictor=torch.cat(predictor),
        targets=tokens("token_ids"),
        sequence_index=sequence_index,
        rollout_logprobs=tokens("rollout_logprobs"),
        advantages=tokens("advantages"),
        versions=tokens("versions"),
    )
