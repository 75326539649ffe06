"""What the parity gate concludes from log-probabilities: the gap, its limits, and which hypothesis explains it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from grpo_ds.batching import collate
from grpo_ds.config import EngineConfig, RecipeError, SyncConfig
from grpo_ds.engine import sglang_wire, vllm_wire
from grpo_ds.engine.base import EngineSettings, Request, SamplingSpec
from grpo_ds.engine.hf import processed_logprobs
from grpo_ds.objective import merge
from grpo_ds.parity.causes import folder_sampling, with_first, without_first
from grpo_ds.parity.gap import Finding, Gap, Limits, cause, diagnosis, farthest, gap_of, gap_stats, limits_of, worst
from grpo_ds.parity.gate import _servers
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
from grpo_ds.types import Sample

LIMITS = Limits(mean=1e-4, p99=1e-3, max=1e-2)
GOOD = Gap(tokens=500, bad=0, mean=1e-7, p99=1e-6, max=2e-6, below=1e-6)
WRONG = Gap(tokens=500, bad=0, mean=0.3, p99=1.0, max=2.0, below=1.5)


def gap(trainer: Tensor, engine: Tensor) -> Gap:
    return gap_of(gap_stats(trainer, engine))


# ---- the gap ----


def test_the_gap_of_two_hundred_tokens_by_hand() -> None:
    """197 differences of 0.1 and three of 0.2, 0.3 and -0.5: the 198th smallest, 0.2, is the 99th percentile."""
    difference = torch.full((200,), 0.1, dtype=torch.float64)
    difference[:3] = torch.tensor([0.2, 0.3, -0.5], dtype=torch.float64)
    found = gap(torch.full((200,), -1.0, dtype=torch.float64), difference - 1.0)
    assert (found.tokens, found.bad) == (200, 0)
    assert found.mean == pytest.approx((197 * 0.1 + 1.0) / 200)
    assert 0.2 <= found.p99 <= 0.2 * 1.05
    assert found.max == pytest.approx(0.5) and found.below == pytest.approx(0.5)


def test_the_gap_does_not_depend_on_the_split_into_micro_batches_and_ranks() -> None:
    torch.manual_seed(0)
    trainer, noise = torch.randn(301), torch.randn(301) * 0.01
    whole = gap(trainer, trainer + noise)
    parts = [gap_stats(a, b) for a, b in zip(trainer.split(77), (trainer + noise).split(77), strict=True)]
    parts.append(gap_stats(torch.empty(0), torch.empty(0)))  # a rank without tokens
    assert gap_of(reduce(merge, parts)) == pytest.approx(whole)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_what_is_not_a_number_never_passes(value: float, side: str) -> None:
    sides = {"trainer": torch.zeros(1000), "engine": torch.zeros(1000)}
    sides[side][7] = value
    found = gap(**sides)
    assert found.bad == 1
    assert not found.within(Limits(math.inf, math.inf, math.inf))
    assert "1 log-probabilities are not finite" in diagnosis(found, [], LIMITS)


def test_a_probe_without_tokens_does_not_pass() -> None:
    found = gap(torch.empty(0), torch.empty(0))
    assert not found.within(Limits(math.inf, math.inf, math.inf))
    assert "no token" in diagnosis(found, [], LIMITS)


@pytest.mark.parametrize(
    ("mean", "p99", "largest", "passes"),
    [
        (1e-4, 1e-3, 1e-2, True),
        (1.1e-4, 2e-4, 3e-4, False),
        (1e-5, 1.1e-3, 2e-3, False),
        (1e-5, 1e-4, 1.1e-2, False),
    ],
)
def test_each_limit_is_one(mean: float, p99: float, largest: float, passes: bool) -> None:
    assert replace(GOOD, mean=mean, p99=p99, max=largest).within(LIMITS) is passes


def test_limits_follow_the_dtype_until_the_recipe_names_them() -> None:
    exact, reduced = limits_of(SyncConfig(), "float32"), limits_of(SyncConfig(), "bfloat16")
    assert exact.mean < exact.p99 < exact.max < reduced.mean < reduced.p99 < reduced.max
    assert limits_of(SyncConfig(parity_p99=0.25), "float32") == Limits(exact.mean, 0.25, exact.max)
    assert limits_of(SyncConfig(parity_mean=0.25), "bfloat16") == Limits(0.25, reduced.p99, reduced.max)
    with pytest.raises(RecipeError, match=r"sync.parity_max must be positive"):
        SyncConfig(parity_max=0.0)


def test_the_gap_of_a_node_is_not_diluted_by_the_others() -> None:
    nodes = [GOOD, replace(GOOD, mean=2e-4, p99=9e-4), replace(GOOD, max=5e-3)]
    found = worst(nodes)
    assert (found.tokens, found.mean, found.p99, found.max) == (1500, 2e-4, 9e-4, 5e-3)
    assert not found.within(LIMITS) and farthest(nodes, LIMITS) == 1
    assert farthest([WRONG, GOOD], Limits(math.inf, math.inf, math.inf)) == 0
    broken = worst([GOOD, replace(GOOD, bad=1, mean=math.nan, p99=math.nan, max=math.nan)])
    assert broken.bad == 1 and not broken.within(Limits(math.inf, math.inf, math.inf))


@pytest.mark.parametrize(
    ("engine", "nodes", "servers"),
    [
        ({}, 2, 1),
        ({"replicas": 4}, 2, 4),
        ({"urls": [f"http://h{k}:1" for k in range(11)]}, 2, 6),
        ({"urls": ["http://127.0.0.1:1", "http://127.0.0.1:2"]}, 3, 2),
    ],
)
def test_as_many_prompts_are_asked_as_the_servers_of_a_node_need(engine: Any, nodes: int, servers: int) -> None:
    recipe: Any = SimpleNamespace(engine=EngineConfig(**engine))
    assert _servers(recipe, nodes) == servers


# ---- which hypothesis ----


def finding(name: str, left: Gap, alike: bool = False) -> Finding:
    return Finding(name, f"it is the {name}", left, alike)


def test_the_first_hypothesis_that_leaves_nothing_is_named() -> None:
    small = replace(WRONG, mean=0.02, p99=0.09)
    tried = [finding("a", WRONG), finding("b", small), finding("c", GOOD), finding("d", replace(GOOD, p99=1e-9))]
    chosen = cause(WRONG, tried, LIMITS)
    assert chosen is not None and chosen.name == "c"
    assert diagnosis(WRONG, tried, LIMITS) == "Cause: it is the c (what is left of the gap then: p99 1e-06 nats)"


def test_without_one_the_largest_reduction_of_at_least_ten_is_named() -> None:
    tried = [finding("a", replace(WRONG, mean=0.02, p99=0.09)), finding("b", replace(WRONG, mean=0.01, p99=0.05))]
    chosen = cause(WRONG, tried, LIMITS)
    assert chosen is not None and chosen.name == "b"


@pytest.mark.parametrize("left", [replace(WRONG, p99=0.11, mean=0.001), replace(WRONG, p99=0.01, mean=0.031)])
def test_a_smaller_reduction_explains_nothing(left: Gap) -> None:
    """Ten times less of the percentile and of the mean: a hypothesis that only mends the tail is none."""
    assert cause(WRONG, [finding("a", left)], LIMITS) is None


def test_an_impossible_hypothesis_explains_nothing() -> None:
    impossible = replace(GOOD, bad=1, mean=math.nan, p99=math.nan, max=math.nan)
    assert cause(WRONG, [finding("a", impossible)], LIMITS) is None
    assert "ruled out: a (impossible)" in diagnosis(WRONG, [finding("a", impossible)], LIMITS)


def test_what_fits_beats_what_is_merely_alike() -> None:
    tried = [finding("alike", WRONG, alike=True), finding("fits", replace(WRONG, mean=0.02, p99=0.09))]
    chosen = cause(WRONG, tried, LIMITS)
    assert chosen is not None and chosen.name == "fits"
    chosen = cause(WRONG, tried[:1], LIMITS)
    assert chosen is not None and chosen.name == "alike"


def test_nothing_found_lists_what_was_ruled_out_and_says_when_all_differences_point_one_way() -> None:
    text = diagnosis(WRONG, [finding("a", WRONG), finding("b", WRONG)], LIMITS)
    assert text.startswith("No cause found; ruled out: a (leaves p99 1), b (leaves p99 1); engine.args")
    assert "samples from fewer tokens" in diagnosis(replace(WRONG, below=1e-6), [], LIMITS)


# ---- sampling ----


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """(400, 50) logits, and a likely target for each row."""
    torch.manual_seed(1)
    logits = torch.randn(400, 50) * 2
    return logits, logits.argmax(-1)


def engine_of(logits: Tensor, targets: Tensor, spec: SamplingSpec) -> Tensor:
    """What the in-process engine would report."""
    return processed_logprobs(logits, spec).gather(1, targets[:, None]).squeeze(1)


def test_log_probabilities_at_a_temperature_are_those_the_engine_reports(drawn: tuple[Tensor, Tensor]) -> None:
    logits, targets = drawn
    wanted = engine_of(logits, targets, SamplingSpec(1, 1, temperature=0.7))
    torch.testing.assert_close(at_temperatures(logits, targets, [1.0, 0.7])[:, 1], wanted)


def test_the_grid_of_temperatures_holds_its_centre_and_reaches_ninefold() -> None:
    grid = temperatures_around(0.8, 0.2)
    assert len(grid) == 25 and grid[12] == 0.8 and grid[0] < 0.8 / 8 and grid[-1] > 0.8 * 8


@pytest.mark.parametrize(
    "spec", [SamplingSpec(1, 1, 0.8, top_k=7), SamplingSpec(1, 1, 0.8, 0.6), SamplingSpec(1, 1, 0.8, 0.7, 9)]
)
def test_a_restricted_distribution_is_the_one_the_engine_reports(
    drawn: tuple[Tensor, Tensor], spec: SamplingSpec
) -> None:
    logits, targets = drawn
    found = sampled_from(logits, targets, Sampling(spec.temperature, spec.top_k, spec.top_p))
    torch.testing.assert_close(found, engine_of(logits, targets, spec))


@pytest.mark.parametrize(
    ("true", "name"),
    [
        (Sampling(0.8, top_k=7), "top-k"),
        (Sampling(0.8, top_k=2), "top-k"),
        (Sampling(0.8, top_p=0.6), "top-p"),
        (Sampling(0.8, top_p=0.99), "top-p"),
        (Sampling(0.8, min_p=0.05), "min-p"),
    ],
)
def test_each_restriction_is_found_from_its_log_probabilities(
    drawn: tuple[Tensor, Tensor], true: Sampling, name: str
) -> None:
    logits, targets = drawn
    engine = sampled_from(logits, targets, true)
    parts = [
        restriction_stats(kept_tokens(logits[i], targets[i], engine[i], 0.8, 1e-3))
        for i in (slice(150), slice(150, 400))
    ]
    tried = restrictions(reduce(merge, parts), 0.8)
    left = {name: gap(sampled_from(logits, targets, sampling), engine) for name, sampling in tried}
    assert left[name].max < 1e-5
    assert all(other.p99 > 1e-3 or other.bad for key, other in left.items() if key != name)
    found = dict(tried)[name]
    assert found.top_k == true.top_k
    assert (found.top_p, found.min_p) == pytest.approx((true.top_p, true.min_p), rel=0.2)


def test_differences_in_both_directions_suggest_no_restriction(drawn: tuple[Tensor, Tensor]) -> None:
    logits, targets = drawn
    engine = at_temperatures(logits, targets, [0.8]).squeeze(1) + torch.randn(400) * 1e-5
    assert restrictions(restriction_stats(kept_tokens(logits, targets, engine, 0.8, 1e-3)), 0.8) == []


def test_a_sampling_says_what_is_on() -> None:
    assert str(Sampling(0.8)) == "temperature 0.8"
    assert str(Sampling(1.0, top_k=20, min_p=0.05)) == "temperature 1, top_k 20, min_p 0.05"


def test_a_model_folder_that_recommends_nothing_samples_from_all_tokens() -> None:
    assert folder_sampling(GenerationConfig()) == Sampling(1.0)
    odd = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)
    assert folder_sampling(odd) == Sampling(0.7, 20, 0.8, 0.1)


# ---- prompt template ----


def sample(*prompt: int) -> Sample:
    """The prompt, and a response of two tokens."""
    count = len(prompt) + 2
    mask = torch.arange(count) >= len(prompt)
    values = torch.where(mask, -0.5, 0.0)
    return Sample(0, torch.tensor([*prompt, 8, 9]), mask, values, values * 0, values.long())


def test_a_bos_token_moves_the_prompt_and_not_the_response() -> None:
    longer = with_first(sample(5, 6), 2)
    assert longer.token_ids.tolist() == [2, 5, 6, 8, 9]
    assert longer.response_mask.tolist() == [False, False, False, True, True]
    assert longer.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]
    assert without_first(longer, 2).token_ids.tolist() == [5, 6, 8, 9]
    collate([longer, without_first(longer, 2)], "padded")  # every per-token array has the length of the tokens


def test_only_the_bos_token_is_taken_off_and_never_the_whole_prompt() -> None:
    assert without_first(sample(5, 6), 2).token_ids.tolist() == [5, 6, 8, 9]
    assert without_first(sample(2), 2).token_ids.tolist() == [2, 8, 9]


# ---- dtype ----


def test_rounding_of_the_same_origin_is_alike_and_chance_is_not() -> None:
    torch.manual_seed(2)
    trainer, rounding, other = torch.randn(2000), torch.randn(2000) * 0.01, torch.randn(2000) * 0.01
    both = likeness_stats(trainer, trainer + rounding + 0.5 * other, trainer + rounding)
    assert alike(both)
    halves = [
        likeness_stats(trainer[i], (trainer + rounding)[i], (trainer + rounding)[i])
        for i in (slice(900), slice(900, 2000))
    ]
    assert alike(reduce(merge, halves))
    assert not alike(likeness_stats(trainer, trainer + other, trainer + rounding))
    assert not alike(likeness_stats(trainer, trainer + 10 * rounding, trainer + rounding))
    assert not alike(likeness_stats(trainer, trainer, trainer))
    assert not alike(likeness_stats(trainer, trainer + math.nan, trainer + rounding))


# ---- sampling settings that do not come from the recipe ----

SETTINGS = EngineSettings("m", "float32", 64, Path("logs"), "cpu", 0)


@pytest.mark.parametrize(
    ("wire", "option"),
    [
        (vllm_wire, "generation_config"),
        (vllm_wire, "override_generation_config"),
        (vllm_wire, "logits_processors"),
        (sglang_wire, "preferred_sampling_params"),
    ],
)
def test_engine_args_cannot_bring_in_other_sampling(wire: object, option: str) -> None:
    with pytest.raises(RecipeError, match=rf"engine.args.{option} .* remove it"):
        wire.server_args(EngineConfig(args={option: {"min_p": 0.1}}), SETTINGS)  # type: ignore[attr-defined]


def test_vllm_is_told_to_leave_the_model_folders_sampling_alone() -> None:
    assert vllm_wire.NEEDED["generation_config"] == "vllm"


def test_sglang_is_told_in_every_request_that_min_p_and_penalties_are_off() -> None:
    *_, body = sglang_wire.generate_bodies(Request((5, 6), 3, "p"), SamplingSpec(n=2, max_tokens=4), 64)
    for sampling in body["sampling_params"]:
        names = ("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
        assert [sampling[name] for name in names] == [0.0, 0.0, 0.0, 1.0]


def test_a_rank_without_tokens_computes_the_same_and_tells_nothing() -> None:
    logits, none, targets = torch.empty(0, 50), torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert at_temperatures(logits, targets, [1.0, 0.7]).shape == (0, 2)
    assert sampled_from(logits, targets, Sampling(1.0, 5, 0.9, 0.1)).shape == (0,)
    told = restriction_stats(kept_tokens(logits, targets, none, 1.0, 1e-3))
    assert restrictions(told, 1.0) == []
