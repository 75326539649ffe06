"""Run by two ranks: train three optimizer steps without publishing, then publish; compare log-probabilities each time.

Prints one JSON line on the main rank: the largest |trainer - engine| log-probability over the engine's own samples.
"""

import json
import sys

import torch

from grpo_ds.balance import assign
from grpo_ds.clock import Clock
from grpo_ds.ending import end
from grpo_ds.loop import update
from grpo_ds.recipe import read_recipe
from grpo_ds.train import Run


def gap(run: Run, round_index: int, version: int) -> tuple[float, list[int]]:
    """Fresh samples of the engine, scored by the trainer under the weights it has now."""
    parts = run.parts
    collection = parts.collector.collect(round_index, version, Clock())
    work = assign(run.recipe, parts.ranks, parts.layout, collection.order, parts.advantage(collection.groups))
    worst = torch.zeros(1, dtype=torch.float64)
    versions: set[int] = set()
    for micros in work.micro_batches(parts.ranks.rank, parts.layout, parts.actor.device):
        for micro in micros:
            difference = (parts.actor.logprobs(micro) - micro.rollout_logprobs).abs()
            worst = torch.maximum(worst, difference.max().double()) if difference.numel() else worst
            versions |= set(micro.versions.tolist())
    run.work = work  # type: ignore[attr-defined]
    return float(parts.ranks.max(worst, "gap")), sorted(versions)


def main() -> None:
    run = Run()
    run.build(*read_recipe(sys.argv[1:]))
    report: dict[str, object] = {}
    report["start"] = gap(run, 0, 0)
    for _ in range(3):
        update(run.parts, run.work, 0, Clock())  # type: ignore[attr-defined]
    report["three steps later, not published"] = gap(run, 1, 0)
    run.publisher.publish(1)
    report["published"] = gap(run, 2, 1)
    run.parts.ranks.barrier("done")
    if run.ranks.is_main:
        print("REPORT " + json.dumps(report), flush=True)
    end(run, 0, None)


if __name__ == "__main__":
    main()
