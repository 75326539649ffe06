"""The hypotheses about a parity gap: each computes the trainer's log-probabilities of the probe as if it were true.

Every rank calls them in the same order, because each is one or more forward passes under ZeRO-3. Those that fit exactly
or not at all come first, the merely similar (dtype) late, and last the one that changes the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ds.batching import MicroBatch
from grpo_ds.objective import merge
from grpo_ds.parity.gap import Finding, gap_of, gap_stats
from grpo_ds.parity.sampling import (
    Sampling,
    alike,
    at_temperatures,
    kept_tokens,
    likeness_stats,
    restriction_stats,
    restrictions,
    sampled_from,
    temperatures_around,
)
from grpo_ds.sync.publish import SyncError
from grpo_ds.types import Sample

if TYPE_CHECKING:
    from grpo_ds.parity.gate import ParityGate, Probe

_ROWS = 128
"""Tokens whose logits are held at once, several times over."""


@dataclass(frozen=True)
class _Tokens:
    """Some tokens of a micro-batch."""

    targets: Tensor
    engine: Tensor
    """The engine's log-probabilities."""


def _from_logits(
    gate: ParityGate, probe: Probe, value: Callable[[Tensor, _Tokens], Tensor], head: Tensor | None = None
) -> list[Tensor]:
    """`value` of (float32 logits before temperature, their tokens) for each micro-batch; by another head if given."""

    def of(batch: MicroBatch, hidden: Tensor, own: Tensor) -> Tensor:
        parts = []
        for start in range(0, max(hidden.shape[0], 1), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = (hidden[rows] @ (own if head is None else head).t()).float()
            parts.append(value(logits, _Tokens(batch.targets[rows], batch.rollout_logprobs[rows])))
        return torch.cat(parts)

    return [gate.policy.observe(batch, partial(of, batch)) for batch in probe.batches]


def temperature(gate: ParityGate, probe: Probe) -> list[Finding]:
    """Log-probabilities of another temperature, or from before the temperature."""
    ours = gate.recipe.rollout.temperature
    best, step = ours, 0.2
    for _ in range(4):
        grid = temperatures_around(best, step)
        best = grid[int(_sums_of_gaps(gate, probe, grid).argmin())]
        step /= 10
    found = [round(best, 2) or best, best]
    columns = _from_logits(gate, probe, lambda logits, tokens: at_temperatures(logits, tokens.targets, found))
    gaps = [gate.gap(probe.batches, [column[:, k] for column in columns]) for k in range(2)]
    left, fitted = min(zip(gaps, found, strict=True), key=lambda pair: pair[0].mean)
    raw = ", which is also that of log-probabilities taken before the temperature" if abs(fitted - 1) < 0.01 else ""
    says = (
        f"sampling temperature: the engine's log-probabilities are those of temperature {fitted:.4g}{raw}, and "
        f"rollout.temperature is {ours:g}"
    )
    return [Finding("temperature", says, left)]


def _sums_of_gaps(gate: ParityGate, probe: Probe, grid: Sequence[float]) -> Tensor:
    """Sum of |engine - trainer| over all ranks at each temperature of the grid."""
    columns = _from_logits(
        gate,
        probe,
        lambda logits, tokens: (at_temperatures(logits, tokens.targets, grid) - tokens.engine[:, None]).abs(),
    )
    return gate.ranks.sum(torch.cat(columns).double().sum(0), "parity temperature")


def restriction(gate: ParityGate, probe: Probe) -> list[Finding]:
    """Top-k, top-p or min-p, or all that the model folder recommends."""
    ours, above = gate.recipe.rollout.temperature, max(gate.limits.p99, 1e-4)
    rows = _from_logits(
        gate, probe, lambda logits, tokens: kept_tokens(logits, tokens.targets, tokens.engine, ours, above)
    )
    tried = restrictions(gate.merged([restriction_stats(row) for row in rows]), ours)
    folder = folder_sampling(gate.policy.engine.module.model.generation_config)
    if folder != Sampling(ours):
        tried.append(("generation_config.json", folder))
    return [_sampled(gate, probe, name, sampling) for name, sampling in tried]


def _sampled(gate: ParityGate, probe: Probe, name: str, sampling: Sampling) -> Finding:
    values = _from_logits(gate, probe, lambda logits, tokens: sampled_from(logits, tokens.targets, sampling))
    says = (
        f"{name}: the engine samples with {sampling}, which the recipe does not say: look at engine.args and at the "
        "server's log"
    )
    return Finding(name, says, gate.gap(probe.batches, values))


def folder_sampling(config: Any) -> Sampling:
    """What the generation_config.json of the model folder would have an engine do; what it leaves out is off."""

    def value(name: str, off: float) -> float:
        found = getattr(config, name, None)
        return off if found is None else found

    return Sampling(
        float(value("temperature", 1.0)) or 1.0,
        int(value("top_k", 0)),
        float(value("top_p", 1.0)),
        float(value("min_p", 0.0)),
    )


def template(gate: ParityGate, probe: Probe) -> list[Finding]:
    """A BOS token that the engine adds or takes off."""
    if gate.bos is None:
        return []
    bos, found = gate.bos, []
    changes: list[tuple[str, Callable[[Sample, int], Sample], str]] = [
        ("BOS added", with_first, f"puts the BOS token ({bos}) before"),
        ("BOS removed", without_first, f"takes the BOS token ({bos}) off"),
    ]
    for name, change, does in changes:
        batches = gate.batches([[change(sample, bos) for sample in micro] for micro in probe.samples])
        says = f"prompt template: the engine {does} the prompts, and the trainer learns from them as they were sent"
        found.append(Finding(name, says, gate.gap(batches, [gate.policy.logprobs(batch) for batch in batches])))
    return found


_PER_TOKEN = ("token_ids", "response_mask", "rollout_logprobs", "advantages", "versions")


def with_first(sample: Sample, token: int) -> Sample:
    """The sequence with a prompt token before it."""
    values: dict[str, Any] = {
        name: torch.cat([torch.zeros_like(getattr(sample, name)[:1]), getattr(sample, name)]) for name in _PER_TOKEN
    }
    values["token_ids"][0] = token
    return replace(sample, **values)


def without_first(sample: Sample, token: int) -> Sample:
    """The sequence without its first token, if that is the one named and not the whole prompt."""
    if int(sample.token_ids[0]) != token or bool(sample.response_mask[1]):
        return sample
    return replace(sample, **{name: getattr(sample, name)[1:] for name in _PER_TOKEN})


def unchanged(gate: ParityGate, probe: Probe) -> list[Finding]:
    """The engines sample the very answers of the last gate, which the trainer has left behind."""
    if gate.agreed is None:
        return []
    stats = gap_stats(torch.empty(0), torch.empty(0))
    # Another node's engine is not judged, and has no answers here.
    for (_, now), (_, then) in zip(probe.answers, gate.agreed.answers, strict=True) if probe.answers else ():
        same = now.token_ids == then.token_ids
        before = torch.tensor(then.logprobs) if same else torch.full((len(now.logprobs),), torch.nan)
        stats = merge(stats, gap_stats(before, torch.tensor(now.logprobs)))
    says = (
        f"stale weights: the engine answers exactly as it did at policy version {gate.agreed_version}, so the "
        "publications since then have not reached it"
    )
    return [Finding("weights of the last gate", says, gap_of(gate.merged([stats])))]


def reference(gate: ParityGate, probe: Probe) -> list[Finding]:
    """The weights that the engine has read from disk, where a reference holds them too."""
    if gate.reference is None:
        return []
    values = [gate.reference.logprobs(batch) for batch in probe.batches]
    says = "stale weights: the engine holds those of the reference, so no publication has reached it"
    return [Finding("weights of the reference", says, gate.gap(probe.batches, values))]


def output_head(gate: ParityGate, probe: Probe) -> list[Finding]:
    """A head that publications do not reach, or one that is wrongly tied to the embedding."""
    does = "the engine still has the head it started with, and all else is new"
    found = [_headed(gate, probe, "head of the start", gate.whole(gate.head, gate.first_head), does)]
    embedding = gate.policy.engine.module.model.get_input_embeddings().weight
    if embedding is not gate.head.param:
        shard = gate.shard_of(embedding)
        does = "the engine takes its input embedding for the head (tied), and the trainer's head is another matrix"
        found.append(_headed(gate, probe, "embedding as head", gate.whole(shard, shard.local(gate.ranks.rank)), does))
    return found


def _headed(gate: ParityGate, probe: Probe, name: str, head: Tensor, does: str) -> Finding:
    ours = [gate.recipe.rollout.temperature]
    values = _from_logits(
        gate, probe, lambda logits, tokens: at_temperatures(logits, tokens.targets, ours).squeeze(1), head
    )
    return Finding(name, f"output head: {does}", gate.gap(probe.batches, values))


def dtype(gate: ParityGate, probe: Probe) -> list[Finding]:
    """The engine computes in 16 bits and the trainer in 32."""
    if gate.dtype != "float32":
        return []
    found = []
    for kind in (torch.bfloat16, torch.float16):
        values = [gate.policy.logprobs(batch, autocast=kind) for batch in probe.batches]
        rows = zip(probe.trainer, probe.batches, values, strict=True)
        stats = [likeness_stats(trainer, batch.rollout_logprobs, value) for trainer, batch, value in rows]
        name = str(kind).removeprefix("torch.")
        says = (
            f"dtype: the gap is the rounding of a model that computes in {name}, and the trainer computes in "
            f"{gate.dtype}: look at engine.args.dtype, or raise sync.parity_mean, _p99 and _max if it is meant so"
        )
        left = gate.gap(probe.batches, values)
        found.append(Finding(name, says, left, alike=alike(gate.merged(stats))))
    return found


def lost_publication(gate: ParityGate, probe: Probe) -> list[Finding]:
    """Publishes the weights once more and asks again."""
    name = "weights published again"
    try:
        gate.publisher.republish()
    except SyncError as error:
        return [Finding(f"{name}: {error}", "", probe.gap)]
    says = "stale weights: a publication was lost; after the same weights were published once more both sides agree"
    return [Finding(name, says, gate.ask().gap)]


HYPOTHESES: tuple[Callable[[ParityGate, Probe], list[Finding]], ...] = (
    temperature,
    restriction,
    template,
    unchanged,
    reference,
    output_head,
    dtype,
    lost_publication,
)
