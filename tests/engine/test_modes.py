"""sync.mode on a real server: long responses among short ones, and new weights after every round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch

from grpo_ds.clock import Clock
from grpo_ds.collect import Collection, Collector
from grpo_ds.config import (
    AlgorithmConfig,
    DataConfig,
    EngineConfig,
    FilterGroupsConfig,
    ModelConfig,
    Recipe,
    RewardConfig,
    RolloutConfig,
    SyncConfig,
    TrainConfig,
)
from grpo_ds.engine.pool import EnginePool
from grpo_ds.evaluate import EngineSampler
from grpo_ds.filters import get_filter
from grpo_ds.inflight import Foreground, InFlight
from grpo_ds.types import Group, Prompt, Rollout, Scored
from tests.engine.bench import Bench, prompt
from tests.engine.conftest import SGLANG
from tests.engine.test_update import Sender, perturb, publish
from tests.unit.engine_fakes import OneRank

ROUNDS = 6
FIRST = 100
"""Policy version of the first round: the session's server has seen others before."""


@pytest.fixture
def sender() -> Iterator[Sender]:
    yield Sender(2**20)


@pytest.fixture(params=["vllm_tied", pytest.param("sglang_tied", marks=SGLANG)])
def server(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.getfixturevalue(request.param)
    shared: Any = found.engine
    pool = EnginePool(
        lambda replica: shared, EngineConfig()
    )  # as a run has it; never closed, the server is the session's
    pool.wait_ready()
    return Bench(pool, found.model)


class Prompts:
    def take(self, start: int, count: int) -> list[Prompt]:
        return [Prompt(k, k, prompt(k), "p", {}) for k in range(start, start + count)]


def grade(pairs: list[tuple[Prompt, list[Rollout]]]) -> list[Group]:
    return [Group(p, tuple(Scored(r, 1.0, 1.0, {"f": 1.0}) for r in rollouts)) for p, rollouts in pairs]


def recipe(mode: str) -> Recipe:
    return Recipe(
        model=ModelConfig(path="m"),
        data=DataConfig(train="t", max_prompt_tokens=64),
        reward=RewardConfig(functions=["f"]),
        # One token of sixteen ends a response, so that most are short and some are long.
        rollout=RolloutConfig(n=2, max_response_tokens=200, prompts_per_batch=12, stop_token_ids=list(range(3, 11))),
        algorithm=AlgorithmConfig(filter_groups=FilterGroupsConfig(enable=False, max_staleness=4)),
        train=TrainConfig(prompts_per_round=4),
        sync=SyncConfig(mode=mode),  # type: ignore[arg-type]
    )


def train(bench: Bench, sender: Sender, mode: str) -> tuple[list[Collection], Collector, dict[int, Any]]:
    """Rounds with a publication after each; returns the policies by version, too."""
    settings, policies = recipe(mode), {}
    sampler = EngineSampler(bench.engine, settings, lambda ids: "", OneRank())  # type: ignore[arg-type]
    generation = Foreground(sampler) if mode == "drain" else InFlight(sampler)
    keep = get_filter("dynamic_sampling")
    collector = Collector(settings, OneRank(), Prompts(), keep, generation, grade, print)  # type: ignore[arg-type]
    collections = []
    for k in range(ROUNDS):
        perturb(bench.model, FIRST + k)
        publish(bench, sender, FIRST + k)
        policies[FIRST + k] = deepcopy(bench.model)
        collections.append(collector.collect(k, FIRST + k, Clock()))
        assert len(collections[-1].order) == 4
    generation.abort()
    return collections, collector, policies


def gap(policy: Any, group: Group, rollout: Rollout, start: int, end: int) -> float:
    """Largest |policy - engine| log-probability of the tokens [start, end)."""
    logits = Bench(None, policy).logits(group.prompt.token_ids, rollout.token_ids)  # type: ignore[arg-type]
    ids = torch.tensor(rollout.token_ids)
    own = logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    return float((own - torch.tensor(rollout.logprobs)).abs()[start:end].max())


def check(collections: list[Collection], collector: Collector, policies: dict[int, Any]) -> list[tuple[int, int]]:
    """Each prompt has one fate, each token is of the policy it says; returns (round, version) of each span."""
    made = Counter(group.prompt.index for collection in collections for group in collection.rollouts)
    assert set(made.values()) == {1}, "each was answered once"
    assert made.keys() | set(collector.unfinished()) == set(range(collector.cursor))
    trained = Counter(index for collection in collections for index in collection.order)
    assert set(trained.values()) == {1} and trained.keys() <= made.keys()
    spans = []
    for k, collection in enumerate(collections):
        for group in collection.rollouts:
            for rollout in (member.rollout for member in group.members):
                assert rollout.finish_reason in ("stop", "length")
                for span in rollout.spans:
                    spans.append((k, span.version))
                    assert gap(policies[span.version], group, rollout, span.start, span.end) < 1e-4
    return spans


def test_drain_has_nothing_in_flight_at_a_publication(server: Bench, sender: Sender) -> None:
    collections, collector, policies = train(server, sender, "drain")
    spans = check(collections, collector, policies)
    assert all(version == FIRST + k for k, version in spans)
    assert collector.unfinished() == []
    # 12 groups a batch serve three rounds of 4.
    assert [c.counts.get("batches", 0) for c in collections] == [1, 0, 0, 1, 0, 0]


def test_keep_lets_requests_run_on_under_the_new_weights_and_says_which_tokens_are_whose(
    server: Bench, sender: Sender
) -> None:
    collections, collector, policies = train(server, sender, "keep")
    check(collections, collector, policies)
    assert sum(c.counts.get("in_flight", 0) for c in collections) > 0
    assert max(lag for c in collections for lag in c.lags) > 0
    mixed = [
        (group, rollout)
        for collection in collections
        for group in collection.rollouts
        for rollout in (member.rollout for member in group.members)
        if len(rollout.spans) > 1
    ]
    assert mixed, "no response ran over a publication"
    for group, rollout in mixed:
        first, second = rollout.spans[:2]
        assert second.version > first.version and first.end == second.start
        assert gap(policies[first.version], group, rollout, second.start, second.end) > 1e-3, "the policies differ"


def test_abort_ends_what_runs_and_asks_it_again_under_the_new_weights(server: Bench, sender: Sender) -> None:
    collections, collector, policies = train(server, sender, "abort")
    spans = check(collections, collector, policies)
    assert all(version == FIRST + k for k, version in spans), "nothing runs over a publication"
    aborted = [c.counts.get("aborted", 0) for c in collections]
    again = [c.counts.get("asked_again", 0) for c in collections]
    assert sum(aborted) > 0 and sum(again) > 0
    assert sum(aborted) - sum(again) == len(collector.unfinished())
