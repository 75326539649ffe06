"""Memory and reads while a model loads under ZeRO-3: python tests/benchmarks/startup.py [--ranks 1 2 4]

A Llama-shaped model of 0.5 GB in two files is made, and dropped from the page cache; then `backend.load_model` runs on
each number of ranks. For every rank it prints, in MB beside the model's size:

    private   the most anonymous memory it had while loading, beyond what it had before
    shared    the most file pages it had mapped, beyond what it had before: pages of the page cache, which the node
              holds once, however many ranks map them
    kept      anonymous memory after loading: its partition
    read      what it read from disk (nothing, where the folder for temporary files is in memory)
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from grpo_ds.actor import backend  # noqa: E402
from grpo_ds.actor.ds_json import actor_config, load_ds_json  # noqa: E402
from grpo_ds.config import ModelConfig  # noqa: E402
from grpo_ds.dist import Ranks  # noqa: E402
from tests.dist.harness import launch  # noqa: E402

COLUMNS = ("private", "shared", "kept", "read", "seconds")


def save_model(folder: Path) -> int:
    """Writes 135M random float32 parameters in files of at most 300 MB; returns their bytes."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="300MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _proc(file: str, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/self/{file}").read_text())
    assert found is not None
    return int(found[1])


def _resident() -> tuple[int, int]:
    """(anonymous, file) memory of this process in bytes."""
    return _proc("status", "RssAnon") * 1024, _proc("status", "RssFile") * 1024


def load(folder: Path) -> dict[str, float]:
    """What one rank needed; run by `launch`."""
    ranks = Ranks(300.0)
    backend.connect(ranks)
    config = actor_config(load_ds_json("zero3.json", [], ""), dtype="float32", grad_clip=1.0, world=ranks.world)
    gc.collect()
    anonymous, mapped, read = *_resident(), _proc("io", "read_bytes")
    peak = [anonymous, mapped]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[:] = map(max, peak, _resident())

    thread = threading.Thread(target=watch)
    ranks.barrier("before loading")
    thread.start()
    start = time.monotonic()
    model: Any = backend.load_model(ModelConfig(path="model"), str(folder / "model"), "float32", config)
    seconds = time.monotonic() - start
    ranks.barrier("loaded")
    done.set()
    thread.join()
    gc.collect()
    kept = _resident()[0] - anonymous
    read = _proc("io", "read_bytes") - read
    assert model.config.num_hidden_layers == 30
    ranks.close()
    found = (peak[0] - anonymous, peak[1] - mapped, kept, read)
    return dict(zip(COLUMNS, [*(number / 1e6 for number in found), seconds], strict=True))


def measure(folder: Path, world: int) -> list[dict[str, float]]:
    """One row a rank."""
    forget(folder / "model")
    results: list[dict[str, float]] = launch("tests.benchmarks.startup:load", world, folder)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        size = save_model(Path(name) / "model") / 1e6
        print(f"model: {size:.0f} MB in {len(list(Path(name).glob('model/*.safetensors')))} files")
        print(f"{'ranks':>5} {'rank':>5} " + " ".join(f"{column:>9}" for column in COLUMNS))
        for world in args.ranks:
            for rank, row in enumerate(measure(Path(name), world)):
                cells = " ".join(f"{row[column]:>9.{2 if column == 'seconds' else 0}f}" for column in COLUMNS)
                print(f"{world:>5} {rank:>5} {cells}", flush=True)


if __name__ == "__main__":
    main()
