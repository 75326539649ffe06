"""What a round's line says of rewards; the rest of it: tests of staleness, mismatch and collection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ds.collect import Collection
from grpo_ds.metrics import reward_means, round_metrics, summarise
from grpo_ds.types import Group, Prompt, Rollout, Scored, VersionSpan

ROLLOUT = Rollout((5,), (-1.0,), "stop", (VersionSpan(0, 0, 1),), "")


class TwinNodes:
    """Two nodes that made the same groups."""

    def sum(self, values: Tensor, what: str) -> Tensor:
        return 2 * values


def collection(*parts: dict[str, float | None]) -> Collection:
    members = tuple(Scored(ROLLOUT, 9.0, 9.0, part) for part in parts)
    group = Group(Prompt(0, 0, (1,), "p", {}), members, None)
    return Collection([], [], {}, [group, replace(group, members=members[:1])])


def test_each_function_has_its_own_mean_over_everything_generated() -> None:
    """math: 1, 0, 0.5 and once more 1; format: -1 where it said something at all; length: never."""
    made = collection(
        {"math": 1.0, "format": None, "length": None},
        {"math": 0.0, "format": -1.0, "length": None},
        {"math": 0.5, "format": -1.0, "length": None},
    )
    found = reward_means(made, ["math", "format", "length"], TwinNodes())  # type: ignore[arg-type]
    assert found == {"reward/math": pytest.approx(0.625), "reward/format": -1.0, "reward/length": None}


def test_sums_of_a_policy_loss_are_logged_over_the_tokens_and_maxima_as_they_are() -> None:
    own = {"policy/ratio_sum": 12.0, "policy/clipped_tokens": 3.0, "policy/ratio_max": 5.0}
    rest = dict.fromkeys(
        ("loss", "entropy_sum", "fresh_tokens", "stale_tokens", "fresh_gap_sum", "mismatch/tokens"), 0.0
    )
    found = summarise({name: torch.tensor(value) for name, value in (own | rest).items()}, 6, steps=1)
    assert {
        name: value for name, value in found.items() if name in own or name in ("policy/ratio", "policy/clipped")
    } == {
        "policy/ratio": 2.0,
        "policy/clipped": 0.5,
        "policy/ratio_max": 5.0,
    }


def test_counts_are_exact_beyond_what_float32_holds() -> None:
    """2^24 + 1 is the first integer that float32 rounds, to 2^24."""
    many: Any = range(2**24 + 1)
    member = Scored(replace(ROLLOUT, token_ids=many), 1.0, 1.0, {})
    made = Collection([], [], {}, [Group(Prompt(0, 0, (1,), "p", {}), (member,), None)])
    assert round_metrics(made, [], {}, [], TwinNodes(), (), {})["tokens_generated"] == 2 * (2**24 + 1)  # type: ignore[arg-type]


def test_a_node_that_made_nothing_takes_part() -> None:
    found = reward_means(Collection([], [], {}), ["math"], TwinNodes())  # type: ignore[arg-type]
    assert found == {"reward/math": None}
