"""Many rounds of requests in flight, on replicas that fail."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from grpo_ds.clock import Clock
from grpo_ds.collect import Collector
from grpo_ds.engine.base import Request
from grpo_ds.evaluate import EngineSampler
from grpo_ds.inflight import InFlight
from tests.unit.engine_fakes import Diary, FakeEngine, Meeting, make_pool, publish, without_logprobs
from tests.unit.test_collect_modes import KEEP, Endless, grade, recipe
from tests.unit.test_inflight import held


def until_published(engine: FakeEngine, *indices: int) -> Callable[[Request], bool]:
    """These prompts wait until the engine has other weights."""
    weights = engine.held
    return lambda request: held(*indices)(request) and engine.held == weights


def slow_until(third: int, when: float) -> Callable[[Request], bool]:
    """Every third prompt waits until then."""
    return lambda request: int(request.request_id.split("-")[-1]) % 3 == third and time.monotonic() < when


@pytest.mark.parametrize("mode", ["keep", "abort"])
@pytest.mark.parametrize("seed", range(2))
def test_rounds_on_replicas_that_fail_answer_and_train_each_prompt_once(mode: str, seed: int) -> None:
    """Two nodes of two replicas, fifteen rounds, kills and rubbish while the trainer works and while it waits."""
    rounds, nodes = 15, 2
    meeting, shared = Meeting(nodes), Meeting(nodes)
    settings = recipe(mode, batch=7, max_staleness=3)
    stories: dict[int, list[Any]] = {}
    current, ends = [0] * nodes, []

    def part(number: int, rank: Any) -> None:
        rng, together, own = random.Random(f"{seed} {number}"), random.Random(seed), Diary()
        pool = make_pool(own, replicas=2, max_restarts=100, stall=1.0, seconds=0.002)

        def republish() -> None:
            shared.rank(number).all_gather(None, "all take part in a publication")
            publish(pool, current[number])

        sampler = EngineSampler(pool, settings, lambda ids: "", rank, republish)
        running = InFlight(sampler)
        collects = Collector(settings, rank, Endless(), KEEP, running, grade, print)
        stories[number] = []
        for version in range(rounds):
            for engine in own.made:
                engine.holds = slow_until(rng.randrange(3), time.monotonic() + 0.05)
                if version == 0:  # 2, 4 and 5 make the round, and 1 is a group that runs on for certain
                    engine.holds = until_published(engine, 0, 1, 3, 6)
            well = [e for e in own.made if not (e.dead or e.rubbish or e.closed)]
            if version > 0 and well and rng.random() < 0.3:
                victim = rng.choice(well)
                setattr(victim, *rng.choice([("dead", True), ("rubbish", without_logprobs)]))
            stories[number].append(collects.collect(version, version, Clock()))
            current[number] = version + 1
            publish(pool, version + 1)
            if together.random() < 0.2:
                running.settle()  # as before an evaluation
        running.abort()
        ends.append((number, collects.cursor, collects.unfinished(), [g.prompt.index for g in collects.carried]))
        pool.close()
        running.close()
        for engine in own.made:
            engine.close()

    meeting.play(part)
    (_, cursor, unfinished, _), (_, *same, _) = sorted(ends)
    assert same == [cursor, unfinished]
    orders = [[c.order for c in stories[number]] for number in range(nodes)]
    assert orders[0] == orders[1]
    trained = Counter(i for order in orders[0] for i in order)
    assert set(trained.values()) == {1} and len(trained) == 3 * rounds
    made = Counter(g.prompt.index for story in stories.values() for c in story for g in c.rollouts)
    assert set(made.values()) == {1}, "each was answered once"
    assert made.keys() | set(unfinished) == set(range(cursor)) and not made.keys() & set(unfinished)
    assert sum(c.counts.get("aborted", 0) for c in stories[0]) > 0 or mode == "keep"
    if mode == "keep":
        spans = [m.rollout.spans for story in stories.values() for c in story for g in c.groups for m in g.members]
        assert any(len(s) > 1 for s in spans), "some were made by two policies"
