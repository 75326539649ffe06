"""Run by two ranks: plants one fault after the other in a run's engine, and reports what the parity gate says of each.

PLANT in the environment names some of the faults, with commas; without it all are planted. Prints one JSON line on the
main rank: {fault: {"numbers": {...}, "error": message or null, "version": of the gate}}.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from grpo_ds.balance import assign
from grpo_ds.clock import Clock
from grpo_ds.ending import end
from grpo_ds.engine import hf, vllm
from grpo_ds.engine.base import RawRollout, Request, SamplingSpec
from grpo_ds.loop import train, update
from grpo_ds.parity import ParityError
from grpo_ds.parity.gap import Limits
from grpo_ds.recipe import read_recipe
from grpo_ds.train import Run

Fault = Callable[[Run], Any]
"""A context manager; on ranks without an engine it does nothing."""


def step(run: Run) -> None:
    """One optimizer step that is not published."""
    parts = run.parts
    collection = parts.collector.collect(0, run.publisher.version, Clock())
    work = assign(run.recipe, parts.ranks, parts.layout, collection.order, parts.advantage(collection.groups))
    update(parts, work, run.publisher.version, Clock())


def asked(change: Callable[[Request, SamplingSpec], tuple[Request, SamplingSpec]]) -> Fault:
    """The engine does something else than it was asked to."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        if run.engine is None:
            yield
            return
        right = run.engine.generate

        def wrong(requests: Sequence[Request], spec: SamplingSpec) -> list[list[RawRollout]]:
            changed = [change(request, spec) for request in requests]
            return list(right([request for request, _ in changed], changed[0][1]))

        with patch.object(run.engine, "generate", wrong):
            yield

    return fault


def sampling(**changes: Any) -> Fault:
    return asked(lambda request, spec: (request, replace(spec, **changes)))


@contextmanager
def nothing(run: Run) -> Iterator[None]:
    yield


@contextmanager
def min_p(run: Run) -> Iterator[None]:
    """As SGLang's preferred_sampling_params or a logits processor of vLLM could bring it in."""
    right = hf.processed_logprobs

    def wrong(logits: Tensor, spec: SamplingSpec) -> Tensor:
        logprobs = right(logits, spec)
        return logprobs.masked_fill(
            logprobs.exp() < 0.1 * logprobs.amax(-1, keepdim=True).exp(), -torch.inf
        ).log_softmax(-1)

    with patch.object(hf, "processed_logprobs", wrong):
        yield


@contextmanager
def folder_defaults(run: Run) -> Iterator[None]:
    """The sampling settings of the model folder, all at once."""
    config = run.policy.engine.module.model.generation_config
    with (
        patch.multiple(config, temperature=0.7, top_p=0.9, top_k=12, min_p=0.0),
        sampling(temperature=0.7, top_p=0.9, top_k=12)(run),
    ):
        yield


@contextmanager
def first_head(run: Run) -> Iterator[None]:
    """The engine computes with the head that it has read from disk."""
    if run.engine is None:
        yield
        return
    model = run.engine._model
    right = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(hf.AutoModelForCausalLM.from_pretrained(run.model_path).lm_head.weight)
    yield
    model.lm_head.weight = right


@contextmanager
def tied_head(run: Run) -> Iterator[None]:
    if run.engine is None:
        yield
        return
    model = run.engine._model
    right = model.lm_head.weight
    model.lm_head.weight = model.model.embed_tokens.weight
    yield
    model.lm_head.weight = right


@contextmanager
def bfloat16(run: Run) -> Iterator[None]:
    if run.engine is None:
        yield
        return
    right = run.engine._model
    run.engine._model = copy.deepcopy(right).to(torch.bfloat16)
    yield
    run.engine._model = right


@contextmanager
def rope(run: Run) -> Iterator[None]:
    """Something that no hypothesis knows and no publication mends."""
    if run.engine is None:
        yield
        return
    table = run.engine._model.model.rotary_emb.inv_freq
    right = table.clone()
    table.mul_(0.8)
    yield
    table.copy_(right)


@contextmanager
def not_a_number(run: Run) -> Iterator[None]:
    if run.engine is None:
        yield
        return
    right = run.engine.generate

    def wrong(requests: Sequence[Request], spec: SamplingSpec) -> list[list[RawRollout]]:
        rows = right(requests, spec)
        rows[0][0] = replace(rows[0][0], logprobs=(float("nan"), *rows[0][0].logprobs[1:]))
        return list(rows)

    with patch.object(run.engine, "generate", wrong):
        yield


@contextmanager
def never_published(run: Run) -> Iterator[None]:
    """Two steps whose publications do not reach the engine, nor does the attempt of the diagnosis."""
    with patch.object(run.publisher, "publish", lambda version: {}):
        step(run)
        step(run)
        yield
    run.publisher.republish()


@contextmanager
def one_publication_lost(run: Run) -> Iterator[None]:
    step(run)
    run.publisher.publish(run.publisher.version + 1)
    step(run)  # this one is lost
    yield


@contextmanager
def weights_of_the_start(run: Run) -> Iterator[None]:
    """The engine was restarted from disk, and nobody remembers an earlier gate."""
    run.parity.agreed = None
    if run.engine:
        run.engine._model = hf.AutoModelForCausalLM.from_pretrained(run.model_path).eval()
    yield
    run.publisher.republish()


@contextmanager
def stale_within_the_limits(run: Run) -> Iterator[None]:
    """A step whose publication does not reach the engine, and leaves a gap that is allowed."""
    run.parity.measure(run.publisher.version)
    run.parity.require()
    step(run)
    with patch.object(run.parity, "limits", Limits(math.inf, math.inf, math.inf)):
        yield
    run.publisher.republish()


def vllm_asks(**changes: Any) -> Fault:
    """The server is told something else than the recipe says."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        right = vllm.generate_body

        def wrong(request: Request, spec: SamplingSpec) -> dict[str, Any]:
            body = right(request, spec)
            body["sampling_params"] |= changes
            return body

        with patch.object(vllm, "generate_body", wrong):
            yield

    return fault


BOS = asked(lambda request, spec: (replace(request, prompt_token_ids=(2, *request.prompt_token_ids)), spec))
NO_BOS = asked(lambda request, spec: (replace(request, prompt_token_ids=request.prompt_token_ids[1:]), spec))


def of_node_one(fault: Fault) -> Fault:
    """Node 0 is sound. The fault must have no collective in it."""
    return lambda run: (fault if run.ranks.node == 1 else nothing)(run)


@contextmanager
def one_node_stale(run: Run) -> Iterator[None]:
    """A publication that loads nothing on node 1, and leaves a gap that is allowed."""

    def deaf(engine: hf.HfEngine, bucket: dict[str, Any], carrier: Any = None) -> None:
        assert engine._ledger is not None
        engine._ledger.arrived(entry["name"] for entry in bucket["tensors"])

    run.parity.measure(run.publisher.version)
    run.parity.require()
    step(run)
    with patch.object(hf.HfEngine, "update_bucket", deaf) if run.ranks.node == 1 else nothing(run):
        run.publisher.publish(run.publisher.version + 1)
    with patch.object(run.parity, "limits", Limits(math.inf, math.inf, math.inf)):
        yield
    run.publisher.republish()


TWO_NODES: dict[str, Fault] = {
    "healthy": nothing,
    "temperature_of_one_node": of_node_one(sampling(temperature=0.5)),
    "one_node_stale": one_node_stale,
}
FAULTS: dict[str, dict[str, Fault]] = {
    "hf": {
        "healthy": nothing,
        "temperature": sampling(temperature=0.5),
        "raw": sampling(temperature=1.0),
        "top_k": sampling(top_k=5),
        "top_p": sampling(top_p=0.8),
        "min_p": min_p,
        "generation_config": folder_defaults,
        "bos": BOS,
        "tied_head": tied_head,
        "bfloat16": bfloat16,
        "rope": rope,
        "not_a_number": not_a_number,
        "never_published": never_published,
        "one_publication_lost": one_publication_lost,
        "first_head": first_head,
        "weights_of_the_start": weights_of_the_start,
        "stale_within_the_limits": stale_within_the_limits,
        "healthy at the end": nothing,
    },
    "vllm": {
        "healthy": nothing,
        "raw": vllm_asks(temperature=1.0),
        "top_k": vllm_asks(top_k=5),
        "top_p": vllm_asks(top_p=0.8),
        "min_p": vllm_asks(min_p=0.1),
        "never_published": never_published,
        "one_publication_lost": one_publication_lost,
        "stale_within_the_limits": stale_within_the_limits,
        "healthy at the end": nothing,
    },
}


def in_the_loop(run: Run) -> dict[str, Any]:
    """A round whose publication does not arrive, with a gate after each."""
    once = replace(run.recipe, sync=replace(run.recipe.sync, parity_every=1), train=replace(run.recipe.train, rounds=1))
    error = None
    with patch.object(run.publisher, "publish", lambda version: {}):
        try:
            train(once, run.parts, 0, run.publisher.version)
        except ParityError as caught:
            error = str(caught)
    run.ranks.barrier("loop")
    return {"error": error, "metrics": (run.folder / "metrics.jsonl").read_text().splitlines()}


def main() -> None:
    run = Run()
    run.build(*read_recipe(sys.argv[1:]))
    report: dict[str, Any] = {}
    faults = TWO_NODES if run.ranks.nodes > 1 else FAULTS[run.recipe.engine.kind]
    chosen = os.environ.get("PLANT")
    for name in chosen.split(",") if chosen else faults:
        with faults[name](run):
            error = None
            numbers = run.parity.measure(run.publisher.version)
            line = run.parity.report()
            try:
                run.parity.require()
            except ParityError as caught:
                error = str(caught)
        errors = run.ranks.all_gather(error, "errors")
        report[name] = {"numbers": numbers, "line": line, "error": error, "same": len(set(errors)) == 1}
    if faults is FAULTS["hf"] and not chosen:
        report["in the loop"] = in_the_loop(run)
    run.parts.ranks.barrier("done")
    if run.ranks.is_main:
        print("REPORT " + json.dumps(report), flush=True)
    end(run, 0, None)


if __name__ == "__main__":
    main()
