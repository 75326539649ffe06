"""The gradient of an optimizer step does not depend on micro-batches, ranks, packing, padding or the samples' order."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import cases, oracle
from tests.dist.cases import GradientCase

# The first test of a world size waits for its launch.
pytestmark = pytest.mark.timeout(600)

TOLERANCE = 1e-5
CASES = [(world, case) for world in (1, 2, 4) for case in cases.gradient_cases(world) if not case.mistake]


@pytest.mark.parametrize(
    ("ranks", "case"), CASES, indirect=["ranks"], ids=[f"world{world}/{case.name}" for world, case in CASES]
)
def test_the_gradient_is_that_of_plain_autograd_in_float64(
    ranks: list[Any], case: GradientCase, truth: oracle.Truth
) -> None:
    error = oracle.error_of(ranks[0]["gradients"][case.name]["gradients"], truth(case))
    print("relative error", error)
    assert error <= TOLERANCE
    norms = [float(torch.cat([g.flatten() for g in step.values()]).norm()) for step in truth(case)]
    for rank in ranks:
        assert rank["gradients"][case.name]["norms"] == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize("case", cases.MISTAKES, ids=lambda case: f"{case.mistake}-{case.spread[0]}")
def test_a_wrong_scale_a_local_denominator_or_a_misplaced_penalty_would_be_noticed(
    world_2: list[Any], case: GradientCase, truth: oracle.Truth
) -> None:
    error = oracle.error_of(world_2[0]["gradients"][case.name]["gradients"], truth(case))
    print("relative error", error)
    # Without the factor W exactly half of the gradient is left on 2 ranks.
    assert error == pytest.approx(0.5, abs=1e-4) if case.mistake == "unscaled" else error > 0.1


@pytest.mark.parametrize("mode", cases.MODES)
def test_the_cases_differ_from_each_other_so_that_one_cannot_pass_for_another(mode: str, truth: oracle.Truth) -> None:
    base = GradientCase(mode=mode)
    others = [GradientCase(loss=name, mode=mode) for name in cases.LOSSES[1:]]
    others += [GradientCase(mode=m) for m in cases.MODES if m != mode]
    others += [GradientCase(mode=mode, kl="loss", spread=("grpo", kind)) for kind in cases.KINDS]
    assert all(oracle.error_of(truth(other), truth(base)) > 1e-2 for other in others)
    base = GradientCase(mode=mode, kl="loss")
    others = [GradientCase(mode=mode, kl="loss", spread=("grpo", kind)) for kind in cases.KINDS[1:]]
    assert all(oracle.error_of(truth(other), truth(base)) > 1e-2 for other in others)
    base = GradientCase(mode=mode, kl="reward")
    others = [GradientCase(loss=name, mode=mode, kl="reward") for name in cases.LOSSES[1:]]
    others += [GradientCase(mode=mode, kl="reward", spread=spread) for spread in cases.SPREADS]
    others += [GradientCase(mode=m, kl="reward") for m in cases.MODES if m != mode]
    assert all(oracle.error_of(truth(other), truth(base)) > 1e-2 for other in others)


@pytest.mark.parametrize("ranks", [2, 4], indirect=True)
def test_some_ranks_have_empty_micro_batches_and_all_ranks_the_same_number(ranks: list[Any]) -> None:
    plans = {name: result["micro_batches"] for name, result in ranks[0]["gradients"].items()}
    steps = [step for plan in plans.values() for step in plan]
    assert all(len({len(rank) for rank in step}) == 1 for step in steps)
    assert any(0 in rank for step in steps for rank in step)
    assert plans[GradientCase().name] != plans[GradientCase(budget=1000).name]


def test_a_rank_whose_only_micro_batch_is_empty_takes_part(world_4: list[Any]) -> None:
    case = GradientCase(mode="seq-mean-token-mean", kl="loss", few=True)
    assert [0] in world_4[0]["gradients"][case.name]["micro_batches"][0]


def _optimizer_truth(folder: Path, samples: list[dict[str, Tensor]]) -> tuple[list[float], dict[str, Tensor]]:
    """Two AdamW steps in float64 with warm-up, clipping and decay; groups 0-1 first, then groups 2-3."""
    model = cases.read_model(folder / "untied", torch.float64)
    with torch.no_grad():
        old = [oracle.logprobs(model, raw) for raw in samples]
    for raw, values in zip(samples, old, strict=True):
        whole = torch.zeros(len(raw["token_ids"]), dtype=torch.float64)
        whole[raw["response_mask"]] = values
        raw["old"] = whole
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    norms = []
    for step, groups in enumerate(((0, 1), (2, 3))):
        part = [raw for raw, group in zip(samples, cases.GROUPS, strict=True) if group in groups]
        optimizer.zero_grad()
        oracle.loss(GradientCase(kl="loss"), partial(oracle.logprobs, model), part).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1) / 2
        optimizer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


STAGES = [(1, "partitioned"), (4, "partitioned"), *((2, s) for s in ("partitioned", "stage1", "stage2"))]


@pytest.mark.parametrize(("ranks", "config"), STAGES, indirect=["ranks"])
def test_two_optimizer_steps_of_a_round_are_adamw_with_warm_up_clipping_and_decay(
    ranks: list[Any], config: str, folder: Path
) -> None:
    norms, weights = _optimizer_truth(folder, cases.read_samples(folder))
    found = ranks[0]["optimizer"][config]
    assert min(norms) > 0.05, "the gradients must be clipped for this test to see clipping"
    assert found["norms"] == pytest.approx(norms, rel=TOLERANCE)
    before = dict(cases.read_model(folder / "untied", torch.float64).named_parameters())
    moved = {k: weights[k] - before[k].detach() for k in weights}
    error = oracle.relative_error({k: found["weights"][k].double() - before[k].detach() for k in weights}, moved)
    print("relative error", error)
    assert error <= 1e-4  # of what the steps moved, which float32 weights hold to about 1e-5
    assert oracle.relative_error(found["weights"], weights) <= TOLERANCE
