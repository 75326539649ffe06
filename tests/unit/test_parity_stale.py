"""Which engines the parity gate finds to answer with the weights of the last gate."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ds.parity import ParityGate
from grpo_ds.parity.gap import Gap
from grpo_ds.parity.gate import Probe
from grpo_ds.parity.stale import Scored, has_slope_one, stands_still
from grpo_ds.types import Prompt, Rollout, VersionSpan

GOOD = Gap(tokens=500, bad=0, mean=1e-7, p99=1e-6, max=2e-6, below=1e-6)


def probe(engine: list[float], trainer: list[float], token: int = 3, version: int = 0) -> Probe:
    """Of one answer of as many tokens."""
    tokens, logprobs = (token,) * len(engine), tuple(engine)
    rollout = Rollout(tokens, logprobs, "length", (VersionSpan(version, 0, len(engine)),), "")
    prompt = Prompt(0, 0, (5,), "", {})
    return Probe(
        [(prompt, rollout)], [], [], [torch.tensor(trainer)], [(prompt, rollout, torch.tensor(trainer))], [GOOD]
    )


@pytest.mark.parametrize(
    ("now", "stuck"),
    [
        (probe([-1.0, -2.0], [-1.0, -2.0 - 1e-6], version=9), True),
        (probe([-1.0, -2.0], [-1.0, -2.0], version=9), False),
        (probe([-1.0, -2.0 - 1e-6], [-1.0, -2.0 - 1e-6]), False),
        (probe([-1.0, -2.0], [-1.5, -2.5], token=4), False),
    ],
    ids=["only the trainer moved", "nobody moved", "both moved", "another token"],
)
def test_engines_stand_still_when_only_the_trainer_moved(now: Probe, stuck: bool) -> None:
    """By one bit of one token: nobody is stuck where the weights are those of the last gate (learning rate 0)."""
    first = probe([-1.0, -2.0], [-1.0, -2.0])
    gate: Any = SimpleNamespace(agreed=first, agreed_version=4, ranks=Alone())
    assert bool(ParityGate._stale(gate, now)) is stuck
    gate.agreed = None
    assert bool(ParityGate._stale(gate, now)) is False


class Alone:
    """The rank of the only node, or of node 0 of two where `other` is what node 1's lead says."""

    node = 0

    def __init__(self, other: Any = None) -> None:
        self.other = other

    def all_gather(self, value: Any, what: str) -> list[Any]:
        return [value] if self.other is None else [value, self.other]


def test_one_node_whose_engine_stands_still_is_named_among_those_that_moved() -> None:
    first, moved = probe([-1.0, -2.0], [-1.0, -2.0]), probe([-1.5, -2.5], [-1.5, -2.5])
    gate: Any = SimpleNamespace(agreed=first, agreed_version=4, ranks=Alone(other=[1, "exactly"]))
    wanted = (
        "stale weights: the engine answers exactly as it did at policy version 4 (node 1), so the publications since"
    )
    assert ParityGate._stale(gate, moved).startswith(wanted)
    gate.ranks = Alone(other=[1, ""])
    assert ParityGate._stale(gate, moved) == ""


ROUNDING = 0.02
"""Of a log-probability in 16 bits, in nats."""


def measured(truth: Tensor) -> Tensor:
    """As a model in 16 bits finds it; another one each time, as on a GPU."""
    return truth + ROUNDING * torch.randn(truth.shape, dtype=truth.dtype)


def sixteen_bits(seed: int, move: float, still: set[int]) -> tuple[list[Scored], list[Scored]]:
    """(now, then) of 6 prompts x 4 answers x 60 tokens, of a policy that moved; the prompts of `still` meet a server that
    holds the weights of then. The answers have the same tokens up to the fiftieth."""
    torch.manual_seed(seed)
    now, then = list[Scored](), list[Scored]()
    for index in range(6):
        prompt = Prompt(index, index, (5,), "", {})
        for _ in range(4):
            old = -torch.rand(60, dtype=torch.float64) * 3
            new = old + move * torch.randn(60, dtype=torch.float64)
            tokens = tuple(range(60))
            engine_then, engine_now = measured(old), measured(old if index in still else new)
            then.append((prompt, answer(tokens, engine_then), measured(old).float()))
            now.append((prompt, answer((*tokens[:50], *[99] * 10), engine_now), measured(new).float()))
    return now, then


def answer(tokens: tuple[int, ...], logprobs: Tensor) -> Rollout:
    return Rollout(tokens, tuple(logprobs.tolist()), "length", (VersionSpan(0, 0, len(tokens)),), "")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("still", [set(range(6)), {2}], ids=["the only server", "one of six servers"])
def test_a_server_with_old_weights_is_seen_in_sixteen_bits(seed: int, still: set[int]) -> None:
    assert stands_still(*sixteen_bits(seed, 0.15, still)) == "still"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("move", [0.0, 0.005, 0.02, 0.05, 0.15, 1.0])
def test_servers_with_new_weights_are_never_taken_for_old_ones(seed: int, move: float) -> None:
    """Nor where the policy has moved by less than rounding, which makes a slope of one half."""
    assert stands_still(*sixteen_bits(seed, move, set())) == ""


def test_a_few_tokens_that_moved_far_tell_nothing() -> None:
    moved, off = torch.full((500,), 1e-3, dtype=torch.float64), torch.zeros(500, dtype=torch.float64)
    moved[:10] = off[:10] = 0.5
    assert not has_slope_one(moved, off)
    moved[:40] = off[:40] = 0.5
    assert has_slope_one(moved, off)


def test_what_is_no_number_stands_nowhere() -> None:
    now, then = sixteen_bits(0, 0.15, {0, 1, 2, 3, 4, 5})
    prompt, said, ours = now[0]
    ours[3] = math.nan
    assert stands_still([(prompt, said, ours)] * 4, then[:4]) == ""
