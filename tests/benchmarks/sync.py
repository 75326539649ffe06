"""Weight publication, measured: python tests/benchmarks/sync.py [--engine vllm sglang] [--bucket-mb 64]

A Llama-shaped model of 135M random parameters, two ZeRO-3 ranks, one engine; for each engine in one run:

  write        the trainer's copy into shared memory, next to memcpy of as many bytes by the same two processes into the
               same memory, taken in turns
  publish      the whole transaction, pause -> resume, and where its time goes
  one by one   the same transaction as OpenRLHF and TRL write it: for each parameter, all ranks gather it whole with
               deepspeed.zero.GatheredParameters, and inside of that the first rank sends it and waits until the engine
               has loaded it. The requests are our own engine's, so the engine loads both in the same way; the parameter
               travels through shared memory, where OpenRLHF and TRL broadcast it in a process group, and their meeting
               of all ranks after each parameter is left out. Both are in favour of this column.
  memory       anonymous memory a rank takes on top while it publishes, sampled every millisecond in publications that
               are not timed

publish and one by one take turns. Medians; the first write is shown on its own, because it meets untouched memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from grpo_ds.actor import backend  # noqa: E402
from grpo_ds.actor.ds_json import actor_config, load_ds_json  # noqa: E402
from grpo_ds.config import ActorConfig, EngineConfig, ModelConfig, SyncConfig  # noqa: E402
from grpo_ds.dist import Ranks  # noqa: E402
from grpo_ds.engine import make_engine  # noqa: E402
from grpo_ds.sync.publish import WeightPublisher  # noqa: E402
from grpo_ds.sync.segment import Segment  # noqa: E402
from tests.dist.harness import launch, meet  # noqa: E402
from tests.models import random_model, save_model  # noqa: E402

STEPS = ("pause", "begin_update", "update_bucket", "finish_update", "flush_cache", "version", "resume")
GOALS = {"write": 0.5, "speedup": 5.0, "memory": 2.0}


class Timed:
    """An engine that notes how long each step of an update takes."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.engine, name)
        if name not in STEPS:
            return method

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


class PeakMemory:
    """The most anonymous memory this process had inside the block, beyond what it had before; in bytes."""

    def __enter__(self) -> PeakMemory:
        self._before = self.peak = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.extra = max(self.peak, _anonymous()) - self._before


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def make_model(dtype: str, path: Path) -> None:
    """135M parameters in the shape of SmolLM: 30 layers, 272 tensors, the head tied to the embedding."""
    from transformers import LlamaConfig

    model = random_model(
        LlamaConfig,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    save_model(model.to(getattr(torch, dtype)), path)


class Bench:
    """One of the two ranks."""

    def __init__(self, folder: Path) -> None:
        self.options = json.loads((folder / "options.json").read_text())
        self.ranks = Ranks(600.0)
        path, dtype = str(folder / "model"), self.options["dtype"]
        engine: Any = None
        if self.ranks.leads_node:
            engine_config = EngineConfig(kind=self.options["engine"], start_timeout_s=400)
            engine = make_engine(
                engine_config,
                model_path=path,
                dtype=dtype,
                max_model_len=256,
                log_dir=folder,
                device="cpu",
                seed=0,
            )
            engine.start()
        try:
            backend.connect(self.ranks)
            config_json = actor_config(
                load_ds_json("zero3.json", [], "actor.deepspeed"), dtype=dtype, grad_clip=1.0, world=self.ranks.world
            )
            model = backend.load_model(ModelConfig(path=path), path, dtype, config_json)
            actor = backend.build_engine(model, config_json, temperature=1.0, chunk=2048, actor=ActorConfig())
            if engine is not None:
                engine.wait_ready()
            meet(folder, "engine ready", 400.0)
        except BaseException:
            if engine is not None:
                engine.close()
            raise
        self.timed = Timed(engine) if engine is not None else None
        config = SyncConfig(bucket_mb=self.options["bucket_mb"], verify=self.options["verify"])
        self.publisher = WeightPublisher(actor.module, self.ranks, self.timed, config)
        self.version = 0

    def together(self, action: Callable[[], object]) -> float:
        """Seconds from a common start until the last rank is done."""
        self.ranks.barrier("start")
        start = time.perf_counter()
        action()
        mine = torch.tensor([time.perf_counter() - start])
        return float(self.ranks.max(mine, "seconds"))

    def write(self) -> None:
        """What a publication copies, without engine and meetings."""
        for i, bucket in enumerate(self.publisher.buckets):
            self.publisher._write(bucket, (i % 2) * self.publisher.half)

    def memcpy(self) -> Callable[[], None]:
        """libc's memcpy of as many bytes from one piece of memory, one call a bucket, to the halves of the segment."""
        publisher, world = self.publisher, self.ranks.world
        source = torch.ones(sum(bucket.nbytes // world for bucket in publisher.buckets), dtype=torch.uint8)
        target = publisher.segment.bytes.data_ptr()

        def copy() -> None:
            done = 0
            for i, bucket in enumerate(publisher.buckets):
                share = bucket.nbytes // world
                start = target + (i % 2) * publisher.half + self.ranks.rank * share
                ctypes.memmove(start, source.data_ptr() + done, share)
                done += share

        return copy

    def one_by_one(self) -> None:
        """The transaction with one gather and one request a parameter."""
        import deepspeed

        engine, version = self.timed, self.version + 1
        if engine is not None:
            engine.pause()
            engine.begin_update([shard.name for shard in self.publisher.shards])
        for shard in self.publisher.shards:
            with deepspeed.zero.GatheredParameters([shard.param]):
                if engine is not None:
                    self.single.view(0, shard.numel, shard.dtype).copy_(shard.param.detach().flatten())
                    entry = {"name": shard.name, "offset": 0, "dtype": self.options["dtype"], "shape": shard.shape}
                    engine.update_bucket({"path": self.single.where, "nbytes": self.single.nbytes, "tensors": [entry]})
        if engine is not None:
            engine.finish_update(version)
            engine.flush_cache()
            engine.resume()
        self.version = version

    def publish(self) -> dict[str, float]:
        """One publication; returns its phases."""
        self.version += 1
        return self.publisher.publish(self.version)

    def transaction(self, action: Callable[[], dict[str, float] | None]) -> dict[str, float]:
        """Seconds of a transaction, of its phases where it says them, and of the engine's steps."""
        if self.timed is not None:
            self.timed.seconds.clear()
        phases: dict[str, float] = {}
        row = {"pause -> resume": self.together(lambda: phases.update(action() or {}))}
        row |= {f"  {name}": seconds for name, seconds in phases.items()}
        if self.timed is not None:
            row |= {f"  engine: {name}": seconds for name, seconds in self.timed.seconds.items()}
        return row

    def extra_memory(self) -> int:
        """Bytes that a publication takes on top on this rank."""
        with PeakMemory() as memory:
            self.publish()
        return memory.extra

    def run(self) -> dict[str, Any]:
        """All measurements."""
        repeats = self.options["repeats"]
        out: dict[str, Any] = {
            "bytes": self.publisher.model_bytes,
            "buckets": len(self.publisher.buckets),
            "half": self.publisher.half,
            "tensors": len(self.publisher.shards),
            "first write": self.together(self.write),
        }
        memcpy = self.memcpy()
        memcpy()
        out["writes"] = [(self.together(self.write), self.together(memcpy)) for _ in range(3 * repeats)]
        biggest = max(shard.numel * shard.dtype.itemsize for shard in self.publisher.shards)
        self.single = Segment.create(biggest)
        # The first updates of a server meet untouched memory; these are not timed.
        out["extra"] = max(self.extra_memory() for _ in range(3))
        self.one_by_one()
        pairs = [(self.transaction(self.publish), self.transaction(self.one_by_one)) for _ in range(repeats)]
        out["transactions"], out["load"] = pairs, os.getloadavg()[0]
        return out

    def close(self) -> None:
        self.publisher.close()
        if self.timed is not None:
            self.timed.engine.close()
        self.ranks.close()


def worker(folder: Path) -> dict[str, Any]:
    """What a rank runs."""
    bench = Bench(folder)
    try:
        return bench.run()
    finally:
        bench.close()


def report(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the tables, a column for each engine; results: by engine, what each rank measured."""
    leads = {engine: ranks[0] for engine, ranks in results.items()}
    one = next(iter(leads.values()))
    gigabytes = one["bytes"] / 1e9
    print(
        f"{gigabytes:.3f} GB of {options.dtype} in {one['tensors']} tensors, 2 ZeRO-3 ranks -> 1 engine, {one['buckets']} "
        f"buckets of at most {options.bucket_mb} MiB, sync.verify {options.verify}, medians of {options.repeats} (copies: "
        f"{3 * options.repeats}), {os.cpu_count()} cores, load "
        + ", ".join(f"{lead['load']:.1f} ({engine})" for engine, lead in leads.items())
    )
    _row("trainer side, GB/s", leads)
    writes = {engine: [gigabytes / write for write, _ in lead["writes"]] for engine, lead in leads.items()}
    copies = {engine: [gigabytes / memcpy for _, memcpy in lead["writes"]] for engine, lead in leads.items()}
    _row("first write", {engine: gigabytes / lead["first write"] for engine, lead in leads.items()}, 2)
    _row("write", {engine: statistics.median(rates) for engine, rates in writes.items()}, 2)
    _row("memcpy", {engine: statistics.median(rates) for engine, rates in copies.items()}, 2)
    ratios = {engine: [m / w for w, m in lead["writes"]] for engine, lead in leads.items()}
    _goal("write / memcpy", {engine: statistics.median(r) for engine, r in ratios.items()}, "write", "at least")

    for side, name in enumerate(("publish, ms", "one by one, ms")):
        _row(name, leads)
        rows = {engine: [pair[side] for pair in lead["transactions"]] for engine, lead in leads.items()}
        for key in next(iter(rows.values()))[0]:
            _row(key, {engine: 1e3 * statistics.median(row[key] for row in many) for engine, many in rows.items()}, 1)
    total = "pause -> resume"
    speedups = {
        engine: statistics.median(single[total] / publish[total] for publish, single in lead["transactions"])
        for engine, lead in leads.items()
    }
    _goal("one by one / publish", speedups, "speedup", "at least")

    _row("memory of a rank, on top", leads)
    extra = {engine: max(rank["extra"] for rank in ranks) for engine, ranks in results.items()}
    _row("peak, MB", {engine: nbytes / 1e6 for engine, nbytes in extra.items()}, 1)
    _goal("peak, buckets", {e: nbytes / leads[e]["half"] for e, nbytes in extra.items()}, "memory", "at most")


def _row(name: str, values: dict[str, Any], digits: int | None = None) -> None:
    """One line; without digits a heading, with the engines' names."""
    cells = [f"{engine:>10}" if digits is None else f"{value:>10.{digits}f}" for engine, value in values.items()]
    print(("\n" if digits is None else "") + f"{name:<28}" + "".join(cells))


def _goal(name: str, values: dict[str, float], goal: str, sense: str) -> None:
    met = [v >= GOALS[goal] if sense == "at least" else v <= GOALS[goal] for v in values.values()]
    cells = "".join(f"{value:>10.2f}" for value in values.values())
    print(f"{name:<28}{cells}   goal {sense} {GOALS[goal]:g}: {', '.join('met' if m else 'MISSED' for m in met)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", nargs="+", default=["vllm"], choices=["vllm", "sglang"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--verify", default="sampled", choices=["off", "sampled", "full"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for engine in options.engine:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "options.json").write_text(json.dumps(vars(options) | {"engine": engine}))
            make_model(options.dtype, folder / "model")
            results[engine] = launch("tests.benchmarks.sync:worker", 2, folder, timeout_s=900.0)
    report(options, results)


if __name__ == "__main__":
    main()
