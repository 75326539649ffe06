"""Two optimizer steps with the optimizer in host memory (DeepSpeed's compiled Adam) and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grpo_ds.actor import backend
from grpo_ds.dist import Ranks
from tests.dist import cases
from tests.dist.parts import MOVING, make_policy, run_round, weights_of


def main(folder: Path) -> dict[str, Any]:
    """{DeepSpeed file: gradient norms of the steps, weights after them, the optimizer's class}."""
    torch.set_num_threads(1)
    ranks = Ranks(240.0)
    backend.connect(ranks)
    # Both ranks ask at once.
    backend.load_cpu_adam(timeout_s=900)
    results = {}
    for config in ("zero3.json", "zero3_offload.json"):
        policy = make_policy(folder, ranks, MOVING, config=config)
        norms = run_round(policy, ranks, cases.read_samples(folder))
        kind = type(policy.engine.optimizer.optimizer).__name__
        results[config] = {"norms": norms, "weights": weights_of(policy), "optimizer": kind}
    ranks.close()
    return results
