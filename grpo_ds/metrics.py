"""Metrics of a round: mergeable sums, and the names under which they are logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from grpo_ds.batching import UpdatePlan
from grpo_ds.collect import DROPPED, Collection
from grpo_ds.dist import Ranks
from grpo_ds.losses import summarise_mismatch
from grpo_ds.rewards import FunctionStats


def reduce_stats(stats: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Merges one rank's statistics with those of all ranks: `*_max` by maximum, all others by sum.

    A plugin may name a statistic in some micro-batches only, so the ranks first agree on the names: a few hundred bytes a
    rank, then two small all-reduces.
    """
    shapes: dict[str, list[int]] = {}
    for part in ranks.all_gather({name: list(value.shape) for name, value in stats.items()}, "names of metrics"):
        shapes |= part
    result: dict[str, Tensor] = {}
    for is_max in (False, True):
        names = sorted(n for n in shapes if n.endswith("_max") is is_max)
        if not names:
            continue
        nothing = float("-inf") if is_max else 0.0
        values = [stats[n] if n in stats else torch.full(shapes[n], nothing) for n in names]
        flat = torch.cat([value.double().flatten() for value in values])
        flat = ranks.max(flat, "metrics") if is_max else ranks.sum(flat, "metrics")
        parts = flat.split([value.numel() for value in values])
        result |= {n: part.reshape(shapes[n]) for n, part in zip(names, parts, strict=True)}
    return result


def summarise(stats: dict[str, Tensor], tokens: float, steps: int) -> dict[str, float | None]:
    """Merged statistics -> what is logged. Sums over tokens become means over `tokens`, maxima stay.

    `loss` is a mean over `steps`: the shares of an optimizer step add up to its loss. Where no token was trained on, there
    are no statistics: loss and entropy are null, and kl, policy/* and mismatch/* are missing.
    """
    if not stats:
        return {"loss": None, "entropy": None, "stale_token_share": 0.0, "logprob_gap": 0.0}
    out: dict[str, float | None] = {"loss": float(stats["loss"]) / steps}
    out["entropy"] = float(stats["entropy_sum"]) / max(tokens, 1)
    if "kl_sum" in stats:
        out["kl"] = float(stats["kl_sum"]) / max(tokens, 1)
    for name, value in stats.items():
        if name.startswith("policy/") and name.endswith("_max"):
            out[name] = float(value)
        elif name.startswith("policy/"):
            plain = name.removesuffix("_tokens").removesuffix("_sum")
            out[plain] = float(value) / max(tokens, 1)
    fresh = float(stats["fresh_tokens"])
    out["stale_token_share"] = float(stats["stale_tokens"]) / max(tokens, 1)
    out["logprob_gap"] = float(stats["fresh_gap_sum"]) / fresh if fresh else 0.0
    mismatch = {n.removeprefix("mismatch/"): v for n, v in stats.items() if n.startswith("mismatch/")}
    out |= {f"mismatch/{name}": value for name, value in summarise_mismatch(mismatch).items()}
    return out


def reward_metrics(mine: dict[str, FunctionStats], ranks: Ranks) -> dict[str, float]:
    """What the reward functions of all nodes did since the round before, evaluations included. Every rank calls it.

    reward/<function>/errors, timeouts, unscored: samples; seconds/reward_p95/<function>: 95th percentile of a call, on the
    slowest node.
    """
    rows = [part for part in ranks.all_gather({n: asdict(s) for n, s in mine.items()}, "reward functions") if part]
    out: dict[str, float] = {}
    for name in rows[0] if rows else ():
        for count in ("errors", "timeouts", "unscored"):
            out[f"reward/{name}/{count}"] = sum(row[name][count] for row in rows)
        out[f"seconds/reward_p95/{name}"] = max(row[name]["p95_call_s"] for row in rows)
    return out


def group_metrics(collection: Collection) -> dict[str, Any]:
    """What became of the round's groups on all nodes; every rank knows it.

    `dropped/<reason>`: as the filter gives it, or `stale`. `version_lag/*`: policy versions that the oldest trained token
    of a group is behind the engines. `kept_groups`: those trained on, of this round and before; `groups/kept_by_filter`:
    those of this round that the filter kept, surplus included. `groups/in_flight`: prompts still being answered at the
    round's end; `groups/aborted`: those whose answers were cut off, and `tokens_aborted`: what had been generated of them,
    which `tokens_generated` does not count; `groups/asked_again`: those asked once more, after an abort or a resume (see
    sync.mode).
    """
    counts = collection.counts
    drops = {f"{DROPPED}{reason}": 0 for reason in ("all_right", "all_wrong", "unscorable", "stale")}
    drops |= {name: count for name, count in counts.items() if name.startswith(DROPPED)}
    return {
        "kept_groups": len(collection.order),
        "dropped_groups": sum(drops.values()),
        **drops,
        "surplus_groups": counts.get("surplus", 0),
        "generation_batches": counts.get("batches", 0),
        "groups/kept_by_filter": counts.get("kept", 0),
        **{f"groups/{name}": counts.get(name, 0) for name in ("in_flight", "aborted", "asked_again")},
        "tokens_aborted": counts.get("tokens_aborted", 0),
        "version_lag/mean": sum(collection.lags) / max(len(collection.lags), 1),
        "version_lag/max": max(collection.lags, default=0),
    }


def reward_means(collection: Collection, functions: Sequence[str], ranks: Ranks) -> dict[str, float | None]:
    """`reward/<function>`: mean of its values over everything generated on all nodes, unweighted and unshaped.

    null where it gave no value. Every rank calls it.
    """
    rows = [member.parts for group in collection.rollouts for member in group.members]
    values = [[parts[name] for parts in rows if parts[name] is not None] for name in functions]
    mine = torch.tensor([[sum(found), len(found)] for found in values], dtype=torch.float64)
    sums = ranks.sum(mine, "rewards of each function").tolist()
    return {f"reward/{name}": total / n if n else None for name, (total, n) in zip(functions, sums, strict=True)}


def round_metrics(
    collection: Collection,
    plan: list[UpdatePlan],
    stats: dict[str, Tensor],
    norms: list[float],
    ranks: Ranks,
    functions: Sequence[str],
    left_out: dict[str, int],
) -> dict[str, Any]:
    """The round over all ranks, under the names of metrics.jsonl. `stats` are merged over ranks already; left_out: this
    rank's responses of kept groups that are not trained on, by reason (every rank names the same ones).

    `reward`: mean shaped reward of the trained groups. `score_all`: mean unshaped score of everything generated.
    `optimizer_steps`: those taken; `optimizer_steps_skipped`: those of which every token is masked. `loss`, `grad_norm`:
    means over those taken, null without any (see `summarise`). `mixed_version_share`: trained responses with tokens of
    several versions. `stale_tokens_masked`: tokens of trained groups that are too old to give a loss
    (filter_groups.max_staleness); `stale_token_share`: of those that do, how many an earlier policy made.
    `left_out/<reason>`: responses of kept groups that are not trained on (`grpo_ds.samples.LEFT_OUT`). The rest:
    `group_metrics` and, for the reward functions of these names, `reward_means`.
    """
    members = [m for group in collection.groups for m in group.members]
    generated = [m for group in collection.rollouts for m in group.members]
    greedy = [group.baseline for group in collection.rollouts if group.baseline]
    rewards = [m.reward for m in members if m.reward is not None]
    scores = [m.score for m in generated if m.score is not None]
    lengths = [len(m.rollout.token_ids) for m in generated]
    cut = [m for m in generated if m.rollout.finish_reason == "length"]
    baseline_tokens = sum(len(m.rollout.token_ids) for m in greedy)
    mixed = sum(len(m.rollout.spans) > 1 for m in members)
    spans = [span for m in members if m.reward is not None for span in m.rollout.spans]
    too_old = sum(span.end - span.start for span in spans if span.version < collection.oldest)
    sums = [sum(rewards), len(rewards), sum(scores), len(scores), sum(lengths), len(lengths), len(cut), baseline_tokens]
    sums += [mixed, len(members), too_old, *left_out.values()]
    total = ranks.sum(torch.tensor(sums, dtype=torch.float64), "round metrics").tolist()
    reward, rewarded, score, scored, tokens, responses, truncated, extra, mixed, trained_responses, too_old = total[:11]
    trained = sum(step.totals.tokens for step in plan)
    taken = len(norms)
    return {
        "reward": reward / max(rewarded, 1),
        "score_all": score / max(scored, 1),
        **reward_means(collection, functions, ranks),
        "grad_norm": sum(norms) / taken if taken else None,
        **group_metrics(collection),
        "mixed_version_share": mixed / max(trained_responses, 1),
        "response_tokens/mean": tokens / max(responses, 1),
        "response_tokens/truncated_share": truncated / max(responses, 1),
        "tokens_generated": tokens + extra,
        "baseline_tokens": extra,
        "responses": responses,
        "unscored": responses - scored,
        "tokens_trained": trained,
        "stale_tokens_masked": too_old,
        "samples": sum(step.samples for step in plan),
        **{f"left_out/{reason}": int(count) for reason, count in zip(left_out, total[11:], strict=True)},
        "optimizer_steps": taken,
        "optimizer_steps_skipped": len(plan) - taken,
        **summarise(stats, trained, taken),
    }
