"""Weight publication, measured: python tests/benchmarks/sync.py [--engine vllm] [--bucket-mb 64] [--dtype float32]

A Llama-shaped model of 135M random parameters, two ZeRO-3 ranks, one engine, all in one run:

  write        the trainer's copy into shared memory, next to memcpy of as many bytes by the same two processes into the
               same memory, taken in turns
  publish      the whole transaction, pause -> resume, and where its time goes
  parameters   the same transaction as it is usually written: each parameter gathered whole on every rank, then one
               HTTP request for it
  memory       anonymous memory a rank takes on top while it publishes, sampled every millisecond

Medians of the repeats; the write of the first publication is shown on its own, because it meets untouched memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
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
            config = EngineConfig(kind=self.options["engine"], start_timeout_s=400)
            engine = make_engine(
                config, model_path=path, dtype=dtype, max_model_len=256, log_dir=folder, device="cpu", seed=0
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
        self.module = actor.module
        self.publisher = self._publisher(self.options["verify"])
        self.version = 0

    def _publisher(self, verify: str) -> WeightPublisher:
        config = SyncConfig(bucket_mb=self.options["bucket_mb"], verify=verify)  # type: ignore[arg-type]
        return WeightPublisher(self.module, self.ranks, self.timed, config)

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

    def by_parameter(self) -> None:
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
        """One publication; its phases, its length, the engine's steps and the memory."""
        if self.timed is not None:
            self.timed.seconds.clear()
        self.version += 1
        phases: dict[str, float] = {}
        with PeakMemory() as memory:
            total = self.together(lambda: phases.update(self.publisher.publish(self.version)))
        row = {"total": total, "extra": float(memory.extra)}
        row |= {f"phase {name}": seconds for name, seconds in phases.items()}
        if self.timed is not None:
            row |= {f"engine {name}": seconds for name, seconds in self.timed.seconds.items()}
        return row

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
        pairs = [(self.together(self.write), self.together(memcpy)) for _ in range(3 * repeats)]
        out["write"], out["memcpy"] = [w for w, _ in pairs], [m for _, m in pairs]
        biggest = max(shard.numel * shard.dtype.itemsize for shard in self.publisher.shards)
        self.single = Segment.create(biggest)
        self.publish()
        out["publish"], out["by parameter"] = [], []
        for _ in range(repeats):
            out["publish"].append(self.publish())
            out["by parameter"].append(self.together(self.by_parameter))
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


def report(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Print the tables."""
    lead, gigabytes = results[0], results[0]["bytes"] / 1e9
    print(
        f"{gigabytes:.3f} GB of {options.dtype} in {lead['tensors']} tensors, {len(results)} ZeRO-3 ranks -> 1 "
        f"{options.engine} engine, {lead['buckets']} buckets of at most {options.bucket_mb} MiB, "
        f"sync.verify {options.verify}, medians of {options.repeats} (copies: {3 * options.repeats})"
    )
    write, memcpy = statistics.median(lead["write"]), statistics.median(lead["memcpy"])
    print(f"\n{'trainer side, both ranks':<34}{'ms':>9}{'GB/s':>9}")
    for name, seconds in (("write, first time", lead["first write"]), ("write", write), ("memcpy", memcpy)):
        print(f"{name:<34}{seconds * 1e3:>9.1f}{gigabytes / seconds:>9.2f}")
    _ratio("write / memcpy, GB/s", memcpy / write, GOALS["write"], "at least")

    def median(key: str, rows: list[dict[str, float]]) -> float:
        return statistics.median(row[key] for row in rows)

    print(f"\n{'transaction':<34}{'ms':>9}{'GB/s':>9}")
    whole, parameters = median("total", lead["publish"]), statistics.median(lead["by parameter"])
    print(f"{'publish, pause -> resume':<34}{whole * 1e3:>9.1f}{gigabytes / whole:>9.2f}")
    for key in lead["publish"][0]:
        if key.startswith(("phase ", "engine ")):
            print(f"{'  ' + key:<34}{median(key, lead['publish']) * 1e3:>9.1f}")
    print(f"{'one gather and request a parameter':<34}{parameters * 1e3:>9.1f}{gigabytes / parameters:>9.2f}")
    _ratio("speed-up", parameters / whole, GOALS["speedup"], "at least")

    print(f"\n{'memory':<34}{'MB':>9}{'buckets':>9}")
    extras = [max(row["extra"] for row in result["publish"]) for result in results]
    for rank, extra in enumerate(extras):
        print(f"{f'extra on rank {rank}':<34}{extra / 1e6:>9.1f}{extra / lead['half']:>9.2f}")
    _ratio("peak, in buckets", max(extras) / lead["half"], GOALS["memory"], "at most")


def _ratio(name: str, value: float, goal: float, sense: str) -> None:
    met = value >= goal if sense == "at least" else value <= goal
    print(f"{name:<34}{value:>9.2f}   goal {sense} {goal:g}: {'met' if met else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "sglang", "hf"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--verify", default="sampled", choices=["off", "sampled", "full"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "options.json").write_text(json.dumps(vars(options)))
        make_model(options.dtype, folder / "model")
        report(options, launch("tests.benchmarks.sync:worker", 2, folder, timeout_s=900.0))


if __name__ == "__main__":
    main()
