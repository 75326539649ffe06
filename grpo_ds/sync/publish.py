"""The weight publication: a versioned transaction between the policy and the engines of every node.

    pause -> begin -> (write bucket | send the one before)* -> finish(version) -> flush cache -> resume

On a node every rank copies its own ZeRO shards to their place in shared memory, without a collective; no rank ever
holds the model. Under the ZeRO stages whose ranks hold whole parameters each copies its share of them. Across nodes
each rank fetches the shards that its peers of the same local rank hold, some 16 MiB in one all-gather whatever the dtypes.
The memory has two halves: ranks exchange and fill one while the engine gets the other, which it maps (`segment`) or is
sent (`group`).

With sync.verify the lead sends checksums along, and an engine that reads other bytes than were written refuses them:
a wrong offset, a mapping of another file, a half overwritten too early.

Bytes, Llama 70B bf16 (141 GB), 64 nodes x 8 ranks, sync.bucket_mb 512: a rank writes 141/8 = 17.6 GB a node into host
memory, of which 17.4 GB arrive over the network in 562 all-gathers of 64 ranks: an MLP matrix (470 MB) has one to itself,
in which each rank sends 0.9 MB and gets 58.7 MB; the engine of a node reads 141 GB; nothing passes a single rank. Both
halves are as large as the largest bucket, and a module larger than sync.bucket_mb is one: the MLPs are 1.4 GB, embedding
and head 2.1 GB each, so the node's ranks share 2 x 2.1 GB. (Engines load whole tensors, so none is split.) Across nodes
also, in each rank, what gloo receives and sends at once: 16 MiB, or 1/8 of a tensor larger than 128 MiB: 263 MB. Gloo, not
NCCL, carries the shards between nodes: TCP over the interface of GLOO_SOCKET_IFNAME, where 139 GB a node take 111 s at
10 Gb/s and 11 s at 100 Gb/s. Engines on other nodes: see `group`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grpo_ds.config import SyncConfig
from grpo_ds.dist import Ranks
from grpo_ds.engine.base import GenerationEngine
from grpo_ds.shards import list_shards
from grpo_ds.sync.buckets import Bucket, make_buckets
from grpo_ds.sync.group import GroupCarrier
from grpo_ds.sync.receive import checksum, host_bytes
from grpo_ds.sync.segment import DeviceSegment, Segment
from grpo_ds.sync.transport import Kind

VERIFY_EVERY = 16
"""With sync.verify sampled, versions between two checksums of the same tensor."""
_PIECE = 16 * 2**20
"""Bytes that arrive in one all-gather across nodes, a larger tensor alone in its own: memory that malloc keeps is faster
than the kernel's fresh pages."""
_PATIENCE = 0.9
"""Part of train.collective_timeout_s that an engine may take to pause: the other ranks wait that long for its lead."""


class SyncError(RuntimeError):
    """A weight publication failed; the message names version, step of the transaction and rank."""


@dataclass(frozen=True)
class _Deadline:
    """Until when the engines have to be done, on the monotonic clock, and how an error says that they were not."""

    at: float
    says: str


class WeightPublisher:
    """Publishes the policy's weights to this node's engine. Every rank calls `publish`; leads hold the engine."""

    def __init__(
        self,
        module: nn.Module,
        ranks: Ranks,
        engine: GenerationEngine | None,
        config: SyncConfig,
        transport: Kind = "shared_memory",
        device: str = "cpu",
    ) -> None:
        """transport: of this node. device: kind of device the engine computes on, for transport group."""
        self.ranks = ranks
        self.engine = engine
        self.config = config
        self.shards = list_shards(module, ranks.world)
        self.buckets = make_buckets(self.shards, ranks.world, config.bucket_mb * 2**20)
        self.half = max(bucket.nbytes for bucket in self.buckets)
        self.segment = self._share(DeviceSegment if transport == "ipc" else Segment)
        self._carrier = GroupCarrier(self.segment.bytes, device, config.timeout_s) if transport == "group" else None
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="weight-sender")
        self.model_bytes = sum(s.numel * s.dtype.itemsize for s in self.shards)
        self._position = {shard.name: i for i, shard in enumerate(self.shards)}
        self._verify_s = 0.0
        self.version = 0
        """Of the last publication."""

    def _share(self, kind: type[Segment] | type[DeviceSegment]) -> Segment | DeviceSegment:
        """The node's lead makes the memory, the others of its node map it."""
        nbytes = 2 * self.half
        mine = kind.create(nbytes) if self.ranks.leads_node else None
        places = self.ranks.all_gather([self.ranks.node, mine.where if mine else None], "weight segment")
        if mine is not None:
            segment = mine
        else:
            where = next(where for node, where in places if node == self.ranks.node and where)
            segment = kind.open(where, nbytes)
        self.ranks.barrier("weight segment mapped")
        return segment

    def _write(self, bucket: Bucket, base: int) -> None:
        """Copies this rank's shards (and, across nodes, those of its column) to their places."""
        if self.ranks.nodes > 1:
            self._exchange(bucket, base)
        else:
            for item in bucket.items:
                mine = item.shard.local(self.ranks.rank)
                start = base + item.place(self.ranks.rank)
                self.segment.view(start, mine.numel(), mine.dtype).copy_(mine)
        self.segment.settle()

    def _exchange(self, bucket: Bucket, base: int) -> None:
        """As bytes, so that dtypes need no collectives of their own; from gloo straight to their places in host memory."""
        for items in bucket.pieces(self.ranks.nodes, _PIECE):
            mine = [item.shard.padded_bytes(self.ranks.rank) for item in items]
            places = [
                [
                    self.segment.view(base + item.place(rank), part.numel(), torch.uint8)
                    for item, part in zip(items, mine, strict=True)
                ]
                for rank in self.ranks.column
            ]
            on_host = self.segment.bytes.device.type == "cpu"
            arrived = places if on_host else [[torch.empty_like(part) for part in mine] for _ in places]
            self.ranks.column_gather(mine, arrived, "weight shards across nodes")
            if not on_host:
                for row, parts in zip(places, arrived, strict=True):
                    for place, part in zip(row, parts, strict=True):
                        place.copy_(part)

    def _manifest(self, bucket: Bucket, base: int) -> dict[str, Any]:
        """As in `grpo_ds.sync.receive`; for a carrier the bucket is a memory of its own, which begins at `base`."""
        origin = 0 if self._carrier else base
        tensors = [
            {
                "name": item.shard.name,
                "offset": origin + item.offset,
                "dtype": str(item.shard.dtype).removeprefix("torch."),
                "shape": list(item.shard.shape),
            }
            for item in bucket.items
        ]
        if self._carrier:
            return {"start": base, "nbytes": bucket.nbytes, "tensors": tensors}
        return {self.segment.key: self.segment.where, "nbytes": self.segment.nbytes, "tensors": tensors}

    def _sums(self, version: int, bucket: Bucket, base: int) -> dict[str, int]:
        """CRC-32 of the whole tensors in the segment that are due in this version."""
        begun = time.monotonic()
        sums = {}
        for item in bucket.items:
            shard = item.shard
            if verified(self.config.verify, version, self._position[shard.name]):
                start = base + item.offset
                part = self.segment.bytes[start : start + shard.numel * shard.dtype.itemsize]
                sums[shard.name] = checksum(host_bytes(part))
        self._verify_s += time.monotonic() - begun
        return sums

    def _send(self, engine: GenerationEngine, version: int, bucket: Bucket, base: int) -> None:
        """Runs beside the ranks' writing of the next bucket."""
        manifest = self._manifest(bucket, base)
        engine.update_bucket(manifest | {"sums": self._sums(version, bucket, base)}, self._carrier)

    def _ask(self, call: Callable[..., object], *args: object) -> Future[object] | None:
        """On a lead, has its engine do something beside this thread, one thing after the other; None on other ranks."""
        return self._sender.submit(call, self.engine, *args) if self.engine else None

    def _agree(self, version: int, what: str, asked: Future[object] | None, deadline: _Deadline) -> None:
        """Waits for what the leads' engines were asked; all ranks go on together, or all raise with the lead's reason."""
        reason = None
        if asked is not None:
            wait([asked], max(0.0, deadline.at - time.monotonic()))
            if not asked.done():
                reason = f"the engine of node {self.ranks.node} was not done {deadline.says}"
            elif error := asked.exception():  # carried to all ranks below, none may be left waiting
                reason = f"{type(error).__name__}: {error}"
        failed = torch.tensor([float(reason is not None)])
        if self.ranks.max(failed, f"weight sync {what}").item():
            reasons = [r for r in self.ranks.all_gather(reason, f"weight sync {what} failed") if r]
            raise SyncError(f"publishing policy version {version} failed in step `{what}`: {reasons[0]}")

    def publish(self, version: int) -> dict[str, float]:
        """Gives every engine the current weights as policy `version`.

        Returns seconds: `pause`, `write` (this rank's copies), `wait` (for the engine and the other ranks between the
        copies) and `finish` follow each other; `verify` (the lead's checksums) is a part of `wait`, or hidden behind
        `write`. Raises SyncError on every rank when any engine failed, missed a deadline (most of
        train.collective_timeout_s to pause, then sync.timeout_s for the rest), read other bytes than were written, or
        does not report the version afterwards.
        """
        clock = time.monotonic()
        seconds = {"pause": 0.0, "write": 0.0, "wait": 0.0, "finish": 0.0}
        self._verify_s = 0.0

        def lap(name: str) -> None:
            nonlocal clock
            now = time.monotonic()
            seconds[name] += now - clock
            clock = now

        # Not within sync.timeout_s: an engine that is being restarted pauses when it is up, and has deadlines for that.
        self._agree(version, "pause", self._ask(lambda engine: engine.pause()), self._until_paused())
        limit = self.config.timeout_s
        deadline = _Deadline(time.monotonic() + limit, f"{limit:g} s (sync.timeout_s) after it had paused")
        names = tuple(shard.name for shard in self.shards)
        self._agree(version, "begin", self._ask(lambda engine: engine.begin_update(names)), deadline)
        lap("pause")
        sending: Future[object] | None = None
        for i, bucket in enumerate(self.buckets):
            base = (i % 2) * self.half
            self._write(bucket, base)
            lap("write")
            # One meeting a bucket: all shards are written, and the engine is done with the half that comes next.
            self._agree(version, f"bucket {i}" if i else "first bucket", sending, deadline)
            lap("wait")
            sending = self._ask(self._send, version, bucket, base)
        self._agree(version, f"bucket {len(self.buckets)}", sending, deadline)
        lap("wait")
        self._agree(version, "finish", self._ask(_finish, version), deadline)
        lap("finish")
        self.version = version
        return seconds | {"verify": self._verify_s}

    def _until_paused(self) -> _Deadline:
        """Ends before the other ranks, which wait in a collective, give up without knowing the reason."""
        whole = self.ranks.timeout_s
        limit = _PATIENCE * whole
        says = f"{limit:g} s after it was asked ({_PATIENCE:g} of the {whole:g} s of train.collective_timeout_s)"
        return _Deadline(time.monotonic() + limit, says)

    def republish(self) -> None:
        """Publishes once more under the version of the last time, for engines that were restarted since."""
        self.publish(self.version)

    def close(self) -> None:
        """Ends the sender thread."""
        self._sender.shutdown(wait=False, cancel_futures=True)


def _finish(engine: GenerationEngine, version: int) -> None:
    engine.finish_update(version)
    engine.flush_cache()
    if (found := engine.version()) != version:
        raise SyncError(f"the engine reports version {found}")
    engine.resume()


def verified(verify: str, version: int, position: int) -> bool:
    """Whether the checksum of the model's `position`-th tensor is due in a version.

    sampled: 1 of 16 tensors, another one each time, so that 16 versions cover the model.
    """
    return verify == "full" or (verify == "sampled" and (position + version) % VERIFY_EVERY == 0)
