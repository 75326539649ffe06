"""Tokens of policies that are too old: which give a loss, and that all denominators count only those."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_ds.batching import SampleSize, UpdatePlan, collate, plan_updates
from grpo_ds.collect import Collection
from grpo_ds.config import ActorConfig, ImportanceConfig
from grpo_ds.estimators import get_estimator
from grpo_ds.losses import get_policy_loss
from grpo_ds.losses.aggregate import MODES
from grpo_ds.metrics import round_metrics
from grpo_ds.objective import Objective, merge
from grpo_ds.samples import AdvantageStage
from grpo_ds.types import Group, Prompt, Rollout, Sample, Scored, VersionSpan

LONGEST = 10
CENTRED = AdvantageStage(get_estimator("dr_grpo"))


def member(versions: Sequence[int], reward: float, finish: Any = "stop", logprobs: Sequence[float] = ()) -> Scored:
    """A response whose tokens were made by these policies."""
    starts = [i for i in range(len(versions)) if i == 0 or versions[i] != versions[i - 1]]
    ends = [*starts[1:], len(versions)]
    spans = tuple(VersionSpan(versions[a], a, b) for a, b in zip(starts, ends, strict=True))
    rollout = Rollout(tuple(range(5, 5 + len(versions))), tuple(logprobs) or (-1.0,) * len(versions), finish, spans, "")
    return Scored(rollout, reward, reward, {})


def group(*members: Scored, index: int = 0) -> Group:
    return Group(Prompt(index, index, (1, 2), "", {}), members)


# At policy 5 with max_staleness 1 the tokens of policy 3 are too old. Rewards 1 and 0: advantages 0.5 and -0.5.
LONG = member([3, 3, 4, 5, 5], 1.0)
OLD = member([3, 3, 3], 0.0)
GROUP = group(LONG, OLD)
OLDEST = 5 - 1


def plan_of(samples: Sequence[Sample], budget: int = 100) -> UpdatePlan:
    sizes = [SampleSize(s.prompt_index, s.token_ids.numel(), int(s.response_mask.sum())) for s in samples]
    groups = len({s.prompt_index for s in samples})
    (plan,) = plan_updates(
        sizes, world=1, budget=budget, layout="padded", groups_per_update=groups, max_response_tokens=LONGEST
    )
    return plan


def gradients(
    samples: Sequence[Sample], mode: str = "token-mean", budget: int = 100, loss: str = "vanilla", **importance: Any
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Of the step's loss with respect to the log-probability of each token of each sample, all -1; and its statistics."""
    objective = Objective(
        get_policy_loss(loss),
        ActorConfig(loss_agg_mode=mode),  # type: ignore[arg-type]
        ImportanceConfig(**(importance or {"level": "off"})),
    )
    plan = plan_of(samples, budget)
    logprobs = [torch.full((s.token_ids.numel(),), -1.0, requires_grad=True) for s in samples]
    stats = []
    for indices in plan.micro_batches[0]:
        chosen = [logprobs[i][samples[i].response_mask] for i in indices]
        lp = torch.cat([torch.empty(0, requires_grad=True), *chosen])
        share, numbers = objective(
            lp,
            torch.zeros(lp.numel()),
            collate([samples[i] for i in indices], "padded"),
            plan.totals,
            version=5,
            old_logprobs=None,
            ref_logprobs=None,
            kl_coef=0.0,
        )
        share.backward()
        stats.append(numbers)
    return [[] if lp.grad is None else lp.grad.tolist() for lp in logprobs], reduce(merge, stats)


def test_tokens_of_policies_before_the_oldest_are_masked_and_the_rest_of_the_sample_is_as_it_was() -> None:
    long, old = CENTRED([GROUP], oldest=OLDEST)
    assert long.response_mask.tolist() == [False, False, False, False, True, True, True]
    assert old.response_mask.tolist() == [False] * 5
    # Both count in the statistics of the group: its mean reward is 1/2.
    assert long.advantages.tolist() == [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert old.advantages.tolist() == [0, 0, -0.5, -0.5, -0.5]
    assert long.versions.tolist() == [-1, -1, 3, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("mode", "each"),
    [
        ("token-mean", -0.5 / 3),
        ("seq-mean-token-mean", -0.5 / 3 / 1),  # the response without a token left is no sequence
        ("seq-mean-token-sum", -0.5 / 1),
        ("seq-mean-token-sum-norm", -0.5 / LONGEST),
    ],
)
def test_the_gradient_is_that_of_the_tokens_left_over_the_count_of_the_tokens_left(mode: str, each: float) -> None:
    (long, _), stats = gradients(CENTRED([GROUP], oldest=OLDEST), mode)
    assert long == pytest.approx([0, 0, 0, 0, each, each, each])
    assert (stats["fresh_tokens"].item(), stats["stale_tokens"].item()) == (2, 1)


def test_without_the_mask_the_same_group_gives_another_gradient() -> None:
    (long, old), _ = gradients(CENTRED([GROUP]))
    assert long == pytest.approx([0, 0] + [-0.5 / 8] * 5)
    assert old == pytest.approx([0, 0] + [0.5 / 8] * 3)


def test_the_weight_of_a_sequence_is_that_of_the_tokens_left() -> None:
    # The trainer says -1 everywhere: log-ratios 2, 8 of the old tokens, 0.1, 0.2, 0.3 of the others.
    long = member([3, 3, 4, 5, 5], 1.0, logprobs=(-3.0, -9.0, -1.1, -1.2, -1.3))
    samples = CENTRED([group(long, OLD)], oldest=OLDEST)
    (found, _), _ = gradients(samples, level="sequence", upper=1e6)
    assert found[4:] == pytest.approx([-0.5 / 3 * math.exp(0.6)] * 3)


def test_the_ratio_of_gspo_is_that_of_the_tokens_left() -> None:
    long, _ = CENTRED([GROUP], oldest=OLDEST)
    micro = collate([long], "padded")
    # log-ratios of the tokens left; those of the masked ones are not even asked for.
    logprobs, old = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.3, -1.0, -0.9])
    loss, _ = get_policy_loss("gspo")(logprobs, old, micro.advantages, micro.sequence_index)
    assert loss.tolist() == pytest.approx([-0.5 * math.exp((0.3 + 0 - 0.1) / 3)] * 3)


def test_a_truncated_response_stays_masked_whatever_its_age() -> None:
    stage = AdvantageStage(get_estimator("dr_grpo"), mask_truncated=True)
    young, cut = stage([group(member([5, 5], 1.0), member([4, 5], 0.0, finish="length"))], oldest=OLDEST)
    assert young.response_mask.sum() == 2 and not cut.response_mask.any()


def test_a_step_whose_tokens_are_all_masked_has_a_zero_gradient_and_no_token() -> None:
    samples = CENTRED([group(member([3, 4], 1.0), OLD)], oldest=6)
    plan = plan_of(samples)
    assert (plan.totals.tokens, plan.totals.sequences, plan.samples) == (0, 0, 2)
    found, stats = gradients(samples)
    assert not any(any(row) for row in found) and stats["loss"].item() == 0


groups = st.lists(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=8).map(sorted), st.sampled_from([0.0, 0.25, 1.0])),
        min_size=2,
        max_size=4,
    ),
    min_size=1,
    max_size=3,
)


@given(
    drawn=groups,
    oldest=st.integers(0, 6),
    mode=st.sampled_from(MODES),
    budget=st.integers(10, 60),
    name=st.sampled_from(
        ["grpo", "dr_grpo", "rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gpg"]
    ),
    level=st.sampled_from(["off", "token", "sequence"]),
)
@settings(max_examples=50, deadline=None)
def test_too_old_tokens_are_those_of_a_batch_whose_response_mask_is_zero_there(
    drawn: list[list[tuple[list[int], float]]], oldest: int, mode: str, budget: int, name: str, level: str
) -> None:
    made = [group(*[member(*one) for one in members], index=k) for k, members in enumerate(drawn)]
    whole = name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "gpg")
    stage = AdvantageStage(get_estimator(name), all_reduce=(lambda values: values) if whole else None)
    everything = stage(made)
    wanted = [replace(s, response_mask=s.response_mask & (s.versions >= oldest)) for s in everything]
    found = stage(made, oldest=oldest)
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("response_mask", "advantages", "versions"))
    assert plan_of(found, budget) == plan_of(wanted, budget)
    (rows, _), (others, _) = (gradients(s, mode, budget, level=level) for s in (found, wanted))
    assert rows == others
    # And in closed form, which knows of no mask: -A / (what the mode divides by), over the tokens that are left.
    left = [[v >= oldest for v in versions] for members in drawn for versions, _ in members]
    tokens, sequences = sum(map(sum, left)), sum(map(any, left))
    for row, sample, keeps in zip(rows, everything, left, strict=True):
        over = {
            "token-mean": tokens,
            "seq-mean-token-mean": sum(keeps) * sequences,
            "seq-mean-token-sum": sequences,
            "seq-mean-token-sum-norm": sequences * LONGEST,
        }[mode]
        gradient = [-float(a) / over if k else 0.0 for a, k in zip(sample.advantages[2:], keeps, strict=True)]
        assert (row[2:] or [0.0] * len(keeps)) == pytest.approx(gradient, abs=1e-6)


class OneRank:
    def sum(self, values: Tensor, what: str) -> Tensor:
        return values


def test_masked_tokens_are_counted() -> None:
    samples = CENTRED([GROUP], oldest=OLDEST)
    _, stats = gradients(samples)
    unscored = replace(OLD, score=None, reward=None)
    trained = group(*GROUP.members, unscored)
    collection = Collection([trained], [0], {}, [trained], [1], OLDEST)
    left_out = CENTRED.left_out([trained])
    row = round_metrics(collection, [plan_of(samples)], stats, [1.0], OneRank(), (), left_out)  # type: ignore[arg-type]
    assert (row["left_out/unscored"], row["left_out/small_group"]) == (1, 0)
    assert (row["stale_tokens_masked"], row["tokens_trained"]) == (5, 3), "2 of one response, 3 of the other"
    assert row["stale_token_share"] == pytest.approx(1 / 3)
