"""The model as a Hugging Face folder: safetensors written by all ranks at once, without gathering anything.

The safetensors format is an 8-byte length, a JSON header and the raw tensors, so every byte's place is known before a
weight is touched: each rank writes its own ZeRO shard at its place in the file. Bytes at 70B bf16: 140 GB in files of at
most 5 GB; 270 MB a rank on 512 ranks. On several nodes the folder must be on a shared file system.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_ds.dist import Ranks
from grpo_ds.records import replace_folder
from grpo_ds.shards import Shard

MAX_FILE_BYTES = 5 * 10**9
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _nbytes(shard: Shard) -> int:
    return shard.numel * shard.dtype.itemsize


def _files(shards: list[Shard], limit: int) -> dict[str, list[Shard]]:
    parts: list[list[Shard]] = [[]]
    used = 0
    for shard in shards:
        if parts[-1] and used + _nbytes(shard) > limit:
            parts.append([])
            used = 0
        parts[-1].append(shard)
        used += _nbytes(shard)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _header(shards: list[Shard]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and the byte offset of each tensor in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    starts = {}
    for shard in shards:
        end = offset + _nbytes(shard)
        entries[shard.name] = {"dtype": _DTYPES[shard.dtype], "shape": shard.shape, "data_offsets": [offset, end]}
        starts[shard.name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def _bytes_of(part: Tensor) -> bytes:
    return part.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def export_model(
    folder: Path,
    shards: list[Shard],
    ranks: Ranks,
    *,
    config: Any,
    generation_config: Any,
    tokenizer: Any,
    limit: int = MAX_FILE_BYTES,
) -> Path:
    """Writes weights (in the training dtype), configs and tokenizer so that `from_pretrained` and engines load them.

    Called by every rank. config, generation_config: the model's own; tied weights are written once. The folder gets its
    name when all of it is on disk; until then an earlier one of that name stays.
    """
    files = _files(shards, limit)
    partial = folder.with_name(f"{folder.name}.partial")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, members in files.items():
            head, starts = _header(members)
            with open(partial / name, "wb") as out:
                out.write(head)
                out.truncate(max(starts[m.name] + _nbytes(m) for m in members))
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(_nbytes(s) for s in shards)},
                "weight_map": {s.name: name for name, members in files.items() for s in members},
            }
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config.save_pretrained(partial)
        # save_pretrained would refuse settings of a published model that contradict each other.
        generation_config.to_json_file(partial / "generation_config.json")
        tokenizer.save_pretrained(partial)
    ranks.barrier("export files made")
    for name, members in files.items():
        _write_own_part(partial / name, members, ranks.rank)
    ranks.barrier("export written")
    if ranks.is_main:
        replace_folder(partial, folder)
    ranks.barrier("export renamed")
    return folder


def _write_own_part(path: Path, members: list[Shard], rank: int) -> None:
    _, starts = _header(members)
    with open(path, "r+b") as out:
        for shard in members:
            begin = rank * shard.length
            part = shard.local(rank)[: max(0, shard.numel - begin)]
            if part.numel():
                os.pwrite(out.fileno(), _bytes_of(part), starts[shard.name] + begin * shard.dtype.itemsize)
        os.fsync(out.fileno())
