"""Where shards lie, how parameters are packed into buckets, and the shared memory they travel through."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from grpo_ds.shards import Shard, list_shards
from grpo_ds.sync.buckets import make_buckets
from grpo_ds.sync.segment import Segment


class Holder(nn.Module):
    """As `TokenLogProbs`: the model lies under the name `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def small_model() -> Any:
    model: Any = nn.Module()
    model.embed = nn.Embedding(7, 3)
    model.layer = nn.Module()
    model.layer.attention = nn.Module()
    for name in "qkv":
        setattr(model.layer.attention, name, nn.Linear(3, 5, bias=False))
    model.norm = nn.LayerNorm(3)
    return model


def shard(name: str, numel: int, world: int) -> Shard:
    param = nn.Parameter(torch.arange(float(numel)))
    return Shard(name, param, (numel,), torch.float32, numel, -(-numel // world))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_shards_of_all_ranks_put_together_are_the_tensor(world: int) -> None:
    for s in list_shards(Holder(small_model()), world):
        parts = [s.local(rank) for rank in range(world)]
        assert torch.equal(torch.cat(parts), s.param.detach().flatten())
        assert all(part.numel() <= s.length for part in parts)


def test_names_are_those_of_the_model_and_a_tied_weight_is_listed_once() -> None:
    model = small_model()
    model.head = nn.Linear(3, 7, bias=False)
    model.head.weight = model.embed.weight
    names = [s.name for s in list_shards(Holder(model), 2)]
    assert names[0] == "embed.weight"
    assert "head.weight" not in names
    assert not any(name.startswith("model.") for name in names)


def test_a_partitioned_parameter_is_sized_by_what_deepspeed_says_not_by_numel() -> None:
    model = small_model()
    param = model.embed.weight
    param.data = torch.empty(0)
    param.ds_numel, param.ds_shape, param.ds_tensor = 21, torch.Size([7, 3]), torch.arange(11.0)
    first = list_shards(Holder(model), 2)[0]
    assert (first.numel, first.shape, first.length) == (21, (7, 3), 11)
    assert first.local(0).tolist() == list(range(11))


def test_buckets_keep_the_order_align_every_tensor_and_leave_each_rank_its_place() -> None:
    world = 3
    shards = [shard(f"layers.{i}.proj.weight", 5 + 13 * i, world) for i in range(6)]
    for limit in (0, 300, 10**6):
        buckets = make_buckets(shards, world, limit)
        assert [item.shard.name for bucket in buckets for item in bucket.items] == [s.name for s in shards]
        for bucket in buckets:
            end = 0
            for item in bucket.items:
                assert item.offset >= end
                assert item.offset % 64 == 0
                end = item.offset + world * item.shard.length * 4
            assert end <= bucket.nbytes


def test_the_limit_decides_how_many_buckets_there_are() -> None:
    shards = [shard(f"layers.{i}.proj.weight", 16, 1) for i in range(6)]  # 64 bytes each
    assert [len(make_buckets(shards, 1, limit)) for limit in (64, 127, 128, 384)] == [6, 6, 3, 1]


def test_parts_of_one_module_stay_together_even_above_the_limit() -> None:
    shards = list_shards(Holder(small_model()), 2)
    buckets = make_buckets(shards, 2, 64)
    (together,) = [b for b in buckets if any("attention" in item.shard.name for item in b.items)]
    assert [item.shard.name for item in together.items] == [f"layer.attention.{name}.weight" for name in "qkv"]
    assert together.nbytes > 64


def test_a_bucket_arrives_in_pieces_below_the_limit_or_a_tensor_alone() -> None:
    # 4 ranks, 2 nodes: of 40, 8, 16, 4, 4, 4 float32 a rank has 10, 2, 4, 1, 1, 1, and two ranks' arrive.
    names = ["a.x.w", "a.y.w", "a.z.w", "a.u.w", "a.v.w", "a.t.w"]
    shards = [shard(name, n, 4) for name, n in zip(names, (40, 8, 16, 4, 4, 4), strict=True)]
    (bucket,) = make_buckets(shards, 4, 2**20)
    pieces = list(bucket.pieces(2, 48))
    assert [[item.shard.length * 8 for item in piece] for piece in pieces] == [[80], [16, 32], [8, 8, 8]]
    assert [item for piece in pieces for item in piece] == list(bucket.items)


def llama_70b(world: int) -> list[Shard]:
    """Shapes only: 80 layers, width 8192, MLP 28672, 8 heads of keys and values, an untied vocabulary of 128256."""
    layer = {
        **{f"self_attn.{name}_proj": (rows, 8192) for name, rows in zip("qkvo", (8192, 1024, 1024, 8192), strict=True)},
        **{"mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192), "mlp.down_proj": (8192, 28672)},
        **{"input_layernorm": (8192,), "post_attention_layernorm": (8192,)},
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (128256, 8192)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(80) for name, shape in layer.items()}
    shapes |= {"model.norm": (8192,), "lm_head": (128256, 8192)}
    shards = []
    for name, shape in shapes.items():
        param = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        shards.append(Shard(f"{name}.weight", param, shape, param.dtype, param.numel(), -(-param.numel() // world)))
    return shards


def test_the_bytes_of_a_70b_model_on_64_nodes_are_those_that_publish_states() -> None:
    """By hand: 128256 x 8192 x 2 B = 2.10 GB is the largest module; a layer takes 3 + 1 + 3 all-gathers, 2 more each end.

    In a layer norms, q, k with v, and o; then each matrix of the MLP, of which 470 MB / 8 arrive.
    """
    buckets = make_buckets(llama_70b(512), 512, 512 * 2**20)
    assert max(bucket.nbytes for bucket in buckets) == 128256 * 8192 * 2
    arriving = [
        sum(item.shard.length * 2 * 64 for item in piece) for bucket in buckets for piece in bucket.pieces(64, 2**24)
    ]
    assert len(arriving) == 80 * 7 + 2 and sum(arriving) == 80 * 213_913_600 + 262_668_288 * 2 + 2048
    assert max(arriving) == 128256 * 8192 * 2 // 8
    assert sum(nbytes == 28672 * 8192 * 2 // 8 for nbytes in arriving) == 240


def test_a_segment_is_shared_with_whoever_opens_its_path_and_has_no_name_on_disk() -> None:
    segment = Segment.create(256)
    assert segment.where.startswith(f"/proc/{os.getpid()}/fd/")
    other = Segment.open(segment.where, 256)
    segment.view(64, 4, torch.float32).copy_(torch.tensor([1.0, -2.0, 3.5, 0.0]))
    assert other.view(64, 4, torch.float32).tolist() == [1.0, -2.0, 3.5, 0.0]
    other.view(64, 1, torch.bfloat16).fill_(2.0)
    assert segment.view(64, 1, torch.bfloat16).item() == 2.0
    assert os.stat(segment.where).st_mode & 0o077 == 0, "for the same user only"
