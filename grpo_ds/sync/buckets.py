"""How parameters travel together: buckets in which every rank has a place of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from grpo_ds.shards import Shard


@dataclass(frozen=True, slots=True)
class Placed:
    """A shard's parameter at a byte offset of its bucket."""

    shard: Shard
    offset: int

    def place(self, rank: int) -> int:
        """Byte offset of a rank's part."""
        return self.offset + rank * self.shard.length * self.shard.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that travel together."""

    items: tuple[Placed, ...]
    nbytes: int

    def pieces(self, nodes: int, limit: int) -> Iterator[list[Placed]]:
        """The items in their order, together while at most `limit` bytes of them arrive at a rank from `nodes`."""
        piece: list[Placed] = []
        filled = 0
        for item in self.items:
            arriving = item.shard.length * item.shard.dtype.itemsize * nodes
            if piece and filled + arriving > limit:
                yield piece
                piece, filled = [], 0
            piece.append(item)
            filled += arriving
        yield piece


def _module_of(name: str) -> str:
    """q/k/v_proj of one attention, gate/up_proj of one MLP share their parent: engines fuse them."""
    parts = name.split(".")
    return ".".join(parts[:-2]) if len(parts) > 2 else name


def make_buckets(shards: Iterable[Shard], world: int, bucket_bytes: int) -> list[Bucket]:
    """Packs parameters into buckets of at most `bucket_bytes`, whole modules together.

    Each parameter takes world x length elements, so that every rank has a place of its own. A module larger than
    a bucket gets a bucket to itself. Offsets are multiples of 64 bytes.
    """
    buckets: list[Bucket] = []
    items: list[Placed] = []
    used = 0
    group: list[Shard] = []

    def size(shard: Shard) -> int:
        return -(-shard.length * world * shard.dtype.itemsize // 64) * 64

    def close() -> None:
        nonlocal items, used
        if items:
            buckets.append(Bucket(tuple(items), used))
        items, used = [], 0

    def place(members: list[Shard]) -> None:
        nonlocal used
        if used + sum(map(size, members)) > bucket_bytes:
            close()
        for shard in members:
            items.append(Placed(shard, used))
            used += size(shard)

    for shard in shards:
        if group and _module_of(group[0].name) != _module_of(shard.name):
            place(group)
            group = []
        group.append(shard)
    place(group)
    close()
    return buckets
