"""Publications to an engine that only reads, and exported folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from grpo_ds.actor import backend
from grpo_ds.actor.export import export_model
from grpo_ds.actor.policy import Policy
from grpo_ds.config import SyncConfig
from grpo_ds.dist import Ranks
from grpo_ds.engine.base import Carrier, Channel
from grpo_ds.shards import list_shards
from grpo_ds.sync.publish import SyncError, WeightPublisher
from grpo_ds.sync.receive import BucketReader
from grpo_ds.sync.transport import Kind
from tests.dist import cases
from tests.dist.parts import MOVING, gathered, make_policy, run_round


class Receiver:
    """A stand-in for an engine: reads the buckets as a real one does and keeps copies."""

    def __init__(self, fail_at: int = -1) -> None:
        self.reader = BucketReader()
        self.channel: Channel | None = None
        self.names: tuple[str, ...] = ()
        self.tensors: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.held = -1
        self.fail_at = fail_at
        self.buckets = 0

    def pause(self) -> None:
        self.calls.append("pause")

    def begin_update(self, names: Sequence[str]) -> None:
        self.calls.append("begin")
        self.names, self.tensors, self.buckets = tuple(names), {}, 0

    def update_bucket(self, bucket: dict[str, Any], carrier: Carrier | None = None) -> None:
        if self.buckets == self.fail_at:
            raise RuntimeError("out of memory in the engine")
        time.sleep(0.01)  # the next bucket is written meanwhile; it must not reach this one's half
        if carrier is None:
            self._read(bucket)
            return
        if self.channel is None:
            self.channel = carrier.open("http://127.0.0.1:1", 1)  # whose only worker is this process
        with self.channel.carry(bucket) as told:
            self._read(told)

    def _read(self, bucket: dict[str, Any]) -> None:
        self.tensors |= {name: view.clone() for name, view in self.reader.tensors(bucket)}
        self.buckets += 1

    def finish_update(self, version: int) -> None:
        self.calls.append("finish")
        self.held = version

    def flush_cache(self) -> None:
        self.calls.append("flush")

    def resume(self) -> None:
        self.calls.append("resume")

    def version(self) -> int:
        return self.held


def sync(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Publications before and after an optimizer step: what the engine holds, and what the policy holds."""
    raw = cases.read_samples(folder)
    variants: list[tuple[str, str, str, int, Kind]] = [
        ("untied", "partitioned", "float32", 0, "shared_memory"),
        ("tied", "partitioned", "float32", 512, "shared_memory"),
        ("untied", "partitioned", "float32", 0, "group"),
    ]
    if ranks.world == 2:
        variants += [
            ("untied", "zero3.json", "bfloat16", 0, "shared_memory"),
            ("untied", "stage0", "bfloat16", 0, "group"),
            ("untied", "stage2", "float32", 0, "shared_memory"),
        ]
    results: dict[str, Any] = {}
    for model, config, dtype, bucket_mb, transport in variants:
        policy = make_policy(folder, ranks, MOVING, model=model, config=config, dtype=dtype)
        receiver = Receiver() if ranks.leads_node else None
        settings = SyncConfig(bucket_mb=bucket_mb, verify="full", timeout_s=120)
        publisher = WeightPublisher(policy.engine.module, ranks, receiver, settings, transport)  # type: ignore[arg-type]
        with patch.object(ranks, "column_gather", wraps=ranks.column_gather) as column_gather:
            publisher.publish(1)
            first = receiver.tensors if receiver else {}
            run_round(policy, ranks, raw)
            publisher.publish(2)
        second, held = receiver.tensors if receiver else {}, gathered(policy)
        params = [shard.param for shard in publisher.shards]
        backend.change_in_place(params, Tensor.neg_)
        publisher.publish(3)
        publisher.close()
        backend.change_in_place(params, Tensor.neg_)
        name = f"{model}/{config}/{dtype}"
        results[name if transport == "shared_memory" else f"{name}/{transport}"] = {
            "first": first,
            "second": second,
            "negated": receiver.tensors if receiver else {},
            "put back": gathered(policy),
            "names": list(receiver.names) if receiver else [],
            "calls": receiver.calls if receiver else [],
            "buckets": receiver.buckets if receiver else 0,
            "exchanges a bucket": column_gather.call_count / (2 * len(publisher.buckets)),
            "held": held,
        }
    results["broken engine"] = _broken_engine(policy, ranks)
    return results


def _broken_engine(policy: Policy, ranks: Ranks) -> str:
    last_node_leads = ranks.leads_node and ranks.node == ranks.nodes - 1
    receiver = (Receiver(fail_at=1 if last_node_leads else -1)) if ranks.leads_node else None
    publisher = WeightPublisher(policy.engine.module, ranks, receiver, SyncConfig(bucket_mb=0))  # type: ignore[arg-type]
    try:
        publisher.publish(5)
    except SyncError as error:
        return str(error)
    finally:
        publisher.close()
    return "no error"


class NoTokenizer:
    """These models have none; export only asks it to save itself."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer-saved").touch()


def export(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Hugging Face folders written by all ranks; the weights that DeepSpeed gathers."""
    raw = cases.read_samples(folder)
    results: dict[str, Any] = {}
    for model, dtype, limit in (("untied", "float32", 10**9), ("untied", "bfloat16", 4000), ("tied", "float32", 8000)):
        if ranks.world != 2 and model != "tied":
            continue
        policy = make_policy(folder, ranks, MOVING, model=model, dtype=dtype)
        run_round(policy, ranks, raw)
        target = folder / f"export-{ranks.world}-{model}-{dtype}"
        shards = list_shards(policy.engine.module, ranks.world)
        model_of = policy.engine.module.model
        export_model(
            target,
            shards,
            ranks,
            config=model_of.config,
            generation_config=model_of.generation_config,
            tokenizer=NoTokenizer(),
            limit=limit,
        )
        results[target.name] = gathered(policy)
    return results
