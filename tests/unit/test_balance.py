"""Samples move from the rank that made them to the rank that trains on them, and values per token back home."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from grpo_ds.balance import assign, per_token_home
from grpo_ds.batching import Layout
from grpo_ds.config import DataConfig, ModelConfig, Recipe, RewardConfig, RolloutConfig, TrainConfig
from grpo_ds.types import Sample

RECIPE = Recipe(
    model=ModelConfig(path="m"),
    data=DataConfig(train="t", max_prompt_tokens=8),
    reward=RewardConfig(functions=["f"]),
    rollout=RolloutConfig(n=2, max_response_tokens=8),
    train=TrainConfig(prompts_per_round=4, prompts_per_update=2, micro_batch_tokens=16),
)


class Thread:
    """A rank among threads: what one says all hear, after everybody has spoken."""

    where = "test"

    def __init__(self, rank: int, board: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.world, self._board, self._meeting = rank, len(board), board, meeting

    def all_gather(self, value: Any, what: str) -> list[Any]:
        self._board[self.rank] = value
        self._meeting.wait(30)
        said = list(self._board)
        self._meeting.wait(30)
        return said

    def exchange(self, outgoing: Sequence[bytes], what: str) -> list[bytes]:
        return [bytes(row[self.rank]) for row in self.all_gather(list(outgoing), what)]


def on_threads(world: int, work: Callable[[Any], Any]) -> list[Any]:
    board: list[Any] = [None] * world
    results: list[Any] = [None] * world
    meeting = threading.Barrier(world)

    def run(rank: int) -> None:
        results[rank] = work(Thread(rank, board, meeting))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def made_by(rank: int) -> list[Sample]:
    """Rank 0 made prompts 30 and 10, rank 1 made 20 and 40, the others nothing; the token ids tell samples apart."""
    samples = []
    for prompt in {0: (30, 10), 1: (20, 40)}.get(rank, ()):
        for k in range(3):
            length = 4 + (prompt // 10 + 3 * k) % 7
            mask = torch.arange(length) >= (length if (prompt, k) == (20, 1) else 2)
            ids = torch.full((length,), prompt + k)
            samples.append(
                Sample(prompt, ids, mask, torch.zeros(length), torch.zeros(length), torch.zeros(length).long())
            )
    return samples


ORDER = [10, 20, 30, 40]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_each_sample_arrives_once_where_the_plan_wants_it(world: int, layout: Layout) -> None:
    results = on_threads(world, lambda ranks: assign(RECIPE, ranks, layout, ORDER, made_by(ranks.rank)))
    assert len({repr(r.plan) for r in results}) == 1
    plan = results[0].plan
    assert len(plan) == 2
    names = [10, 11, 12, 20, 21, 22, 30, 31, 32, 40, 41, 42]  # prompt order, whoever made them
    assert sorted(i for r in results for i in r.samples) == list(range(12))
    for rank, result in enumerate(results):
        assert sorted(result.samples) == sorted(i for step in plan for m in step.micro_batches[rank] for i in m)
        assert {i: int(s.token_ids[0]) for i, s in result.samples.items()} == {i: names[i] for i in result.samples}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_values_per_token_come_home_in_the_order_of_the_samples(world: int, layout: Layout) -> None:
    def work(ranks: Any) -> Any:
        assignment = assign(RECIPE, ranks, layout, ORDER, made_by(ranks.rank))
        steps = assignment.micro_batches(ranks.rank, layout, torch.device("cpu"))
        return per_token_home(assignment, ranks, [[micro.targets * 1.5 for micro in micros] for micros in steps])

    for rank, home in enumerate(on_threads(world, work)):
        want = [(s.token_ids[s.response_mask] * 1.5).tolist() for s in made_by(rank)]
        assert [part.tolist() for part in home] == want


def test_a_round_without_a_sample_is_an_error() -> None:
    ranks = Thread(0, [None], threading.Barrier(1))
    with pytest.raises(RuntimeError, match="none of the kept groups has a sample to train on"):
        assign(RECIPE, ranks, "packed", ORDER, [])  # type: ignore[arg-type]
