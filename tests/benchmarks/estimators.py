"""Time of the vectorised estimators against a plain Python loop over samples: python tests/benchmarks/estimators.py

65,536 responses in 8,192 groups of 8, 32 tokens wide, on one CPU thread. The loops take one sample at a
time, as the definitions are written; their results are compared with the vectorised ones.

Both are timed in turns: one loop, then some calls of the estimator. The rows are medians over the turns, the ratio too.
A process started without the allocator settings of the launch scripts starts itself again with them: without, malloc
gives every large tensor back to the kernel and asks for it again, which costs more than the arithmetic on it.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_ds.estimators import get_estimator

Args = tuple[Tensor, Tensor, Tensor]
GOAL = 50.0
"""Least ratio of `grpo`."""
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_MMAP_THRESHOLD_": "17179869184"}
CALLS = 5
"""Calls of the estimator in a turn."""


def members(index: list[int]) -> dict[int, list[int]]:
    """The samples of each group."""
    out: dict[int, list[int]] = {}
    for i, label in enumerate(index):
        out.setdefault(label, []).append(i)
    return out


def loop_totals(args: Args) -> tuple[list[float], dict[int, list[int]], Tensor]:
    """R_i sample by sample."""
    rewards, mask, index = args
    return [float((rewards[i] * mask[i]).sum()) for i in range(len(rewards))], members(index.tolist()), mask


def spread(values: list[float], mask: Tensor) -> Tensor:
    """Advantage on each token, sample by sample."""
    return torch.stack([value * row for value, row in zip(values, mask, strict=True)])


def loop_group(args: Args, baseline: Callable[[float, list[float]], float]) -> Tensor:
    """Any group-relative estimator: one call of `baseline(R_i, R of its group)` a sample."""
    totals, groups, mask = loop_totals(args)
    out = [0.0] * len(totals)
    for indices in groups.values():
        values = [totals[i] for i in indices]
        for i in indices:
            out[i] = baseline(totals[i], values)
    return spread(out, mask)


def grpo(reward: float, group: list[float]) -> float:
    """(R - mean) / (std + eps)"""
    mean = sum(group) / len(group)
    return (reward - mean) / (math.sqrt(sum((v - mean) ** 2 for v in group) / (len(group) - 1)) + 1e-6)


def dr_grpo(reward: float, group: list[float]) -> float:
    """R - mean"""
    return reward - sum(group) / len(group)


def rloo(reward: float, group: list[float]) -> float:
    """R - mean of the others"""
    return reward - (sum(group) - reward) / (len(group) - 1)


def maxrl(reward: float, group: list[float]) -> float:
    """(R - mean) / mean"""
    mean = sum(group) / len(group)
    return (reward - mean) / mean if mean > 0 else 0.0


def passk(reward: float, group: list[float]) -> float:
    """(first - second) / (std + eps) for the best"""
    first, second = sorted(group, reverse=True)[:2]
    mean = sum(group) / len(group)
    std = math.sqrt(sum((v - mean) ** 2 for v in group) / (len(group) - 1))
    return (first - second) / (std + 1e-6) if reward == first else 0.0


def loop_reinforce(args: Args, gamma: float) -> Tensor:
    """The backward scan of reinforce_plus_plus, token by token, then whitening."""
    rows = []
    for rewards, mask in zip(args[0].tolist(), args[1].tolist(), strict=True):
        running, row = 0.0, [0.0] * len(rewards)
        for t in range(len(rewards) - 1, -1, -1):
            if mask[t]:
                running = rewards[t] + gamma * running
                row[t] = running
        rows.append(row)
    returns = torch.tensor(rows, dtype=torch.float64)
    kept = returns[args[1].bool()]
    return (returns - kept.mean()) / (kept.var() + 1e-8).sqrt() * args[1]


LOOPS: list[tuple[str, dict[str, Any], Callable[[Args], Tensor]]] = [
    ("grpo", {}, lambda args: loop_group(args, grpo)),
    ("dr_grpo", {}, lambda args: loop_group(args, dr_grpo)),
    ("grpo_passk", {}, lambda args: loop_group(args, passk)),
    ("rloo", {}, lambda args: loop_group(args, rloo)),
    ("maxrl", {}, lambda args: loop_group(args, maxrl)),
    ("reinforce_plus_plus", {}, lambda args: loop_reinforce(args, 1.0)),
    ("reinforce_plus_plus", {"gamma": 0.99}, lambda args: loop_reinforce(args, 0.99)),
]


def again_with_allocator_settings() -> None:
    """Replaces this process by one that has them; settings of the caller's own are kept."""
    if missing := {name: value for name, value in ALLOCATOR.items() if name not in os.environ}:
        print("starting again with", *(f"{name}={value}" for name, value in missing.items()), flush=True)
        os.execve(sys.executable, sys.orig_argv, os.environ | missing)


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Milliseconds, and the result."""
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start) * 1e3, result


def compare(fast: Callable[[], Tensor], slow: Callable[[], Tensor], turns: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median ratio; AssertionError unless they agree."""
    rows = []
    fast()
    for _ in range(turns):
        loop, expected = timed(slow)
        calls = [timed(fast) for _ in range(CALLS)]
        torch.testing.assert_close(calls[0][1], expected.float(), rtol=1e-3, atol=1e-4)
        rows.append((statistics.median(ms for ms, _ in calls), loop))
    vectorised, loops = zip(*rows, strict=True)
    ratio = statistics.median(loop / ms for ms, loop in rows)
    return statistics.median(vectorised), statistics.median(loops), ratio


def first_of(estimator: Any, args: Args) -> Tensor:
    """The advantages."""
    return estimator(*args)[0]


def main() -> None:
    """Print one row an estimator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=8192)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    n = options.groups * options.group_size
    lengths = torch.randint(1, options.tokens + 1, (n, 1), generator=random)
    mask = (torch.arange(options.tokens) < lengths).float()
    rewards = torch.zeros(n, options.tokens).scatter_(1, lengths - 1, torch.rand(n, 1, generator=random))
    index = torch.arange(options.groups).repeat_interleave(options.group_size)[torch.randperm(n, generator=random)]
    args = rewards, mask, index
    print(f"{n} responses, {options.groups} groups, {options.tokens} tokens, one CPU thread, {options.turns} turns")
    print(*(f"{name}={os.environ[name]}" for name in ALLOCATOR))
    print(f"{'estimator':<34} {'vectorised ms':>13} {'loop ms':>9} {'ratio':>7}")
    for name, settings, loop in LOOPS:
        estimator = get_estimator(name, **settings)
        fast, slow, ratio = compare(partial(first_of, estimator, args), partial(loop, args), options.turns)
        label = name + "".join(f" {key}={value}" for key, value in settings.items())
        goal = f"   goal at least {GOAL:g}: {'met' if ratio >= GOAL else 'MISSED'}" if name == "grpo" else ""
        print(f"{label:<34} {fast:>13.1f} {slow:>9.0f} {ratio:>7.0f}{goal}", flush=True)


if __name__ == "__main__":
    again_with_allocator_settings()
    main()
