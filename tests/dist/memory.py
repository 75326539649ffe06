"""What saves memory must not change a gradient: recomputed activations, and 16-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_ds.actor.policy import Policy
from grpo_ds.batching import MicroBatch, collate
from grpo_ds.dist import Ranks
from tests.dist import cases
from tests.dist.parts import STILL, make_policy

MICRO_BATCHES = ((0, 1, 2), (3, 5))
PIECES = 32
"""Backward passes that together are one; a power of two, so that a piece is exactly this part of the whole."""
STAGES = ("partitioned", "stage1", "stage2")


def _micro_batches(folder: Path, ranks: Ranks) -> list[MicroBatch]:
    """Each rank starts with another one."""
    raw = cases.read_samples(folder)
    batches = [collate([cases.as_sample(raw[i], i) for i in micro], "padded") for micro in MICRO_BATCHES]
    return batches if ranks.rank == 0 else batches[::-1]


def recomputation(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """{(ZeRO configuration, switched on): log-probabilities, gradient, runs of a layer, bytes kept for the backward}."""
    if ranks.world != 2:
        return {}
    results = {}
    for config in ("partitioned", "stage2"):
        for on in (False, True):
            policy = make_policy(folder, ranks, STILL, config=config, recompute=on)
            runs: list[int] = []
            for layer in policy.engine.module.model.model.layers:
                layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
            kept: list[int] = []

            def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
                kept.append(tensor.numel() * tensor.element_size())
                return tensor

            found = []
            for micro in _micro_batches(folder, ranks):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    logprobs, _ = policy.forward(micro)
                policy.backward((logprobs * micro.advantages).sum())
                found.append(logprobs.detach())
            passes = len(runs)
            policy.step()
            found += [policy.logprobs(micro) for micro in _micro_batches(folder, ranks)]
            results[f"{config}/{on}"] = {
                "logprobs": found,
                "moments": _first_moments(policy),
                "runs": passes,
                "kept": sum(kept),
            }
    return results


def pieces(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """{ZeRO configuration: gradient norms of a step in bfloat16, made in one backward pass and in PIECES; moments}."""
    if ranks.world != 2:
        return {}
    (micro, _) = _micro_batches(folder, ranks)
    results = {}
    for config in STAGES:
        norms, moments = [], []
        for count in (1, PIECES):
            policy = make_policy(folder, ranks, STILL, config=config, dtype="bfloat16")
            for _ in range(count):
                logprobs, _ = policy.forward(micro)
                policy.backward((logprobs * micro.advantages).sum() / count)
            norms.append(policy.step())
            moments.append(_first_moments(policy))
        results[config] = {"norms": norms, "moments": moments}
    return results


def _first_moments(policy: Policy) -> Tensor:
    """This rank's part of Adam's first moment after one step: the gradient times 1 - beta_1."""
    optimizer = policy.engine.optimizer.optimizer
    parts = [state["exp_avg"].float().flatten() for state in optimizer.state.values()]
    return torch.cat(parts).cpu().clone()
