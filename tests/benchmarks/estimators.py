"""Time of the vectorised estimators against a plain Python loop over samples: python tests/benchmarks/estimators.py

65,536 responses in 8,192 groups of 8, 32 tokens wide, on one CPU thread. The loops take one sample at a
time, as the definitions are written; their results are compared with the vectorised ones.

Both are timed in turns: one loop, then some calls of the estimator. The rows are medians over the turns, the ratio too.
Exit code 1 when `grpo` misses its goal, which is set for the default size.
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

from grpo_ds.estimators import REGISTRY, get_estimator

Args = tuple[Tensor, Tensor, Tensor]
Loop = Callable[[Args, dict[str, Tensor]], Tensor]
"""(the three arguments, what the estimator needs beside them) -> advantages"""
WEIGHTS = [1.0, 0.5, 2.0]
"""Of the reward functions."""
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


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Token by token: minus the mean of all tokens, over their deviation."""
    pairs = [list(zip(row, kept, strict=True)) for row, kept in zip(values.tolist(), mask.tolist(), strict=True)]
    flat = [v for row in pairs for v, m in row if m]
    mean = sum(flat) / len(flat)
    scale = math.sqrt(sum((v - mean) ** 2 for v in flat) / (len(flat) - 1) + 1e-8)
    return torch.tensor([[(v - mean) / scale if m else 0.0 for v, m in row] for row in pairs])


def scan(args: Args, gamma: float) -> Tensor:
    """Discounted rewards to go, token by token from the last."""
    rows = []
    for rewards, mask in zip(args[0].tolist(), args[1].tolist(), strict=True):
        running, row = 0.0, [0.0] * len(rewards)
        for t in range(len(rewards) - 1, -1, -1):
            if mask[t]:
                running = rewards[t] + gamma * running
                row[t] = running
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def loop_reinforce(args: Args, gamma: float) -> Tensor:
    """The backward scan, then whitening."""
    return whitened(scan(args, gamma), args[1])


def loop_reinforce_baseline(args: Args) -> Tensor:
    """R - mean on each token, then whitening."""
    return whitened(loop_group(args, dr_grpo), args[1])


def loop_remax(args: Args, greedy: Tensor) -> Tensor:
    """The rewards to go of each sample minus the reward of its prompt's greedy response."""
    returns = scan(args, 1.0)
    return torch.stack([(returns[i] - greedy[i]) * args[1][i] for i in range(len(returns))])


def loop_opo(args: Args) -> Tensor:
    """R minus the length-weighted mean of its group."""
    totals, groups, mask = loop_totals(args)
    lengths = [float(row.sum()) for row in mask]
    out = [0.0] * len(totals)
    for indices in groups.values():
        baseline = sum(lengths[i] * totals[i] for i in indices) / sum(lengths[i] for i in indices)
        for i in indices:
            out[i] = totals[i] - baseline
    return spread(out, mask)


def loop_gpg(args: Args) -> Tensor:
    """(R - mean) times samples over samples with a reward."""
    totals = loop_totals(args)[0]
    alpha = len(totals) / max(sum(total != 0 for total in totals), 1)
    return alpha * loop_group(args, dr_grpo)


def loop_gdpo(args: Args, function_rewards: Tensor) -> Tensor:
    """Each function as in grpo, weighted sum, whitening."""
    groups, parts = members(args[2].tolist()), function_rewards.tolist()
    out = [0.0] * len(parts)
    for indices in groups.values():
        for k, weight in enumerate(WEIGHTS):
            values = [parts[i][k] for i in indices]
            for i in indices:
                out[i] += weight * grpo(parts[i][k], values)
    return whitened(spread(out, args[1]), args[1])


LOOPS: list[tuple[str, dict[str, Any], Loop]] = [
    ("grpo", {}, lambda args, _: loop_group(args, grpo)),
    ("grpo_vectorized", {}, lambda args, _: loop_group(args, grpo)),
    ("dr_grpo", {}, lambda args, _: loop_group(args, dr_grpo)),
    ("grpo_passk", {}, lambda args, _: loop_group(args, passk)),
    ("rloo", {}, lambda args, _: loop_group(args, rloo)),
    ("reinforce_plus_plus", {}, lambda args, _: loop_reinforce(args, 1.0)),
    ("reinforce_plus_plus", {"gamma": 0.99}, lambda args, _: loop_reinforce(args, 0.99)),
    ("reinforce_plus_plus_baseline", {}, lambda args, _: loop_reinforce_baseline(args)),
    ("remax", {}, lambda args, needs: loop_remax(args, needs["greedy_rewards"])),
    ("opo", {}, lambda args, _: loop_opo(args)),
    ("gpg", {}, lambda args, _: loop_gpg(args)),
    ("maxrl", {}, lambda args, _: loop_group(args, maxrl)),
    ("gdpo", {"weights": WEIGHTS}, lambda args, needs: loop_gdpo(args, needs["function_rewards"])),
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
        torch.testing.assert_close(calls[0][1], expected.float(), rtol=1e-5, atol=1e-5)
        rows.append((statistics.median(ms for ms, _ in calls), loop))
    vectorised, loops = zip(*rows, strict=True)
    ratio = statistics.median(loop / ms for ms, loop in rows)
    return statistics.median(vectorised), statistics.median(loops), ratio


def first_of(estimator: Any, args: Args, needs: dict[str, Tensor]) -> Tensor:
    """The advantages."""
    return estimator(*args, **needs)[0]


def make_batch(groups: int, size: int, tokens: int) -> tuple[Args, dict[str, Tensor]]:
    """The three arguments, and what some estimators need beside them."""
    random = torch.Generator().manual_seed(0)
    n = groups * size
    lengths = torch.randint(1, tokens + 1, (n, 1), generator=random)
    mask = (torch.arange(tokens) < lengths).float()
    outcomes = torch.rand(n, 1, generator=random) * (torch.rand(n, 1, generator=random) > 0.2)
    index = torch.arange(groups).repeat_interleave(size)[torch.randperm(n, generator=random)]
    needs = {
        "greedy_rewards": torch.rand(groups, generator=random)[index],
        "function_rewards": torch.rand(n, len(WEIGHTS), generator=random),
    }
    return (torch.zeros(n, tokens).scatter_(1, lengths - 1, outcomes), mask, index), needs


def declared(name: str, everything: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this estimator needs of it."""
    needs, keywords = (
        REGISTRY.needs(name),
        {"greedy_baseline": "greedy_rewards", "per_function_rewards": "function_rewards"},
    )
    return {keyword: everything[keyword] for need, keyword in keywords.items() if needs[need]}


def main() -> int:
    """Print one row an estimator; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=8192)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    args, everything = make_batch(options.groups, options.group_size, options.tokens)
    print(
        f"{len(args[0])} responses, {options.groups} groups, {options.tokens} tokens, one CPU thread, "
        f"{options.turns} turns"
    )
    print(*(f"{name}={os.environ[name]}" for name in ALLOCATOR))
    print(f"{'estimator':<34} {'vectorised ms':>13} {'loop ms':>9} {'ratio':>7}")
    missed = False
    for name, settings, loop in LOOPS:
        needs = declared(name, everything)
        work = partial(first_of, get_estimator(name, **settings), args, needs), partial(loop, args, needs)
        fast, slow, ratio = compare(*work, options.turns)
        label = name + "".join(f" {key}={value}" for key, value in settings.items())
        verdict = ""
        if name == "grpo":
            missed = ratio < GOAL
            verdict = f"   goal at least {GOAL:g}: {'MISSED' if missed else 'met'}"
        print(f"{label:<34} {fast:>13.1f} {slow:>9.0f} {ratio:>7.0f}{verdict}", flush=True)
    return int(missed)


if __name__ == "__main__":
    again_with_allocator_settings()
    sys.exit(main())
