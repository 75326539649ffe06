"""The composition of policy loss, importance weight, KL and reduction, on numbers small enough to do by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ds.batching import MicroBatch, collate
from grpo_ds.config import ActorConfig, ImportanceConfig
from grpo_ds.losses import Totals, get_policy_loss
from grpo_ds.objective import Objective, merge
from grpo_ds.types import Sample

TOTALS = Totals(tokens=8, sequences=4, max_response_tokens=10)


def micro(advantages: list[float], rollout: list[float], versions: list[int]) -> MicroBatch:
    """One sequence: a prompt token, then response tokens."""
    length = 1 + len(advantages)
    pad = torch.zeros(1)
    return collate(
        [
            Sample(
                0,
                torch.arange(length),
                torch.arange(length) > 0,
                torch.cat([pad, torch.tensor(rollout)]),
                torch.cat([pad, torch.tensor(advantages)]),
                torch.tensor([-1, *versions]),
            )
        ],
        "packed",
    )


def call(batch: MicroBatch, lp: Tensor, *, old: Tensor | None = None, ref: Tensor | None = None, **actor: Any) -> Any:
    importance = ImportanceConfig(**actor.pop("importance", {"level": "off"}))
    kl_coef = actor.pop("kl_coef", 0.0)
    objective = Objective(get_policy_loss("vanilla"), ActorConfig(**actor), importance)
    return objective(
        lp, lp.detach() * 0 + 0.5, batch, TOTALS, version=3, old_logprobs=old, ref_logprobs=ref, kl_coef=kl_coef
    )


BATCH = micro([1.0, 2.0], [-1.0, -1.0], [3, 2])


def test_without_old_log_probabilities_the_ratio_is_one_and_the_gradient_is_minus_the_advantage() -> None:
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    share, _ = call(BATCH, lp)
    share.backward()
    assert share.item() == pytest.approx(-(1 + 2) / 8)
    assert lp.grad is not None
    assert lp.grad.tolist() == pytest.approx([-1 / 8, -2 / 8])


def test_the_share_is_over_the_steps_counts_not_over_what_is_here() -> None:
    shares = [
        call(BATCH, torch.zeros(2), loss_agg_mode=mode)[0].item() for mode in ("token-mean", "seq-mean-token-mean")
    ]
    assert shares == pytest.approx([-3 / 8, -1.5 / 4])


def test_importance_weights_scale_the_policy_loss_and_leave_the_kl_alone() -> None:
    lp = torch.tensor([-1.0, -1.0]) + math.log(4)
    importance = {"level": "token", "mode": "truncate", "upper": 2.0}
    plain = call(BATCH, lp, importance=importance)[0].item()
    with_kl = call(BATCH, lp, ref=lp - 1, importance=importance, kl_coef=0.5, kl_loss_type="k1")[0].item()
    assert plain == pytest.approx(2 * -3 / 8)  # both weights are exp(log 4), cut at 2
    assert with_kl - plain == pytest.approx(0.5 * (1 + 1) / 8)


def test_kl_placed_in_the_reward_is_reported_and_not_added() -> None:
    lp = torch.zeros(2)
    share, stats = call(BATCH, lp, ref=lp - 1, kl_coef=0.5, kl_loss_type="k1", kl_placement="reward")
    assert share.item() == pytest.approx(-3 / 8)
    assert stats["kl_sum"].item() == pytest.approx(2.0)


def test_only_tokens_of_the_current_version_count_as_fresh() -> None:
    _, stats = call(BATCH, torch.tensor([-1.25, -3.0]))
    assert (stats["fresh_tokens"].item(), stats["stale_tokens"].item()) == (1.0, 1.0)
    assert stats["fresh_gap_sum"].item() == pytest.approx(0.25)
    assert stats["entropy_sum"].item() == pytest.approx(1.0)


def test_an_empty_micro_batch_gives_a_zero_with_a_gradient_and_the_same_statistics() -> None:
    lp = torch.empty(0, requires_grad=True)
    share, stats = call(collate([], "padded"), lp, ref=torch.empty(0), kl_coef=0.5)
    share.backward()
    assert share.item() == 0.0
    assert all(value.sum().item() == 0.0 for value in stats.values())
    assert stats.keys() == call(BATCH, torch.zeros(2), ref=torch.zeros(2))[1].keys()


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (lambda lp: (lp.mean(), {}), r"a loss of shape \(\)"),
        (lambda lp: (lp[None], {}), r"a loss of shape \(1, 2\)"),
        (lambda lp: lp, "a Tensor"),
        (lambda lp: (lp, {}, {}), "a tuple of 3"),
        (lambda lp: (lp.detach(), {}), "a loss without a gradient"),
        (lambda lp: (lp.long(), {}), "a loss of type torch.int64"),
        (lambda lp: (0.5, {}), "a loss of type float"),
        (lambda lp: (lp * float("inf"), {}), "the loss -inf for finite log-probabilities"),
        (lambda lp: (lp, {"clipped": 0.5}), "stats that are no dict of tensors"),
        (lambda lp: (lp, {"ok": lp.sum(), "clipped": lp > 0}), r"the statistic 'clipped' of shape \(2,\)"),
    ],
)
def test_a_policy_loss_that_breaks_its_contract_is_named(result: Any, fault: str) -> None:
    objective = Objective(lambda lp, *_: result(lp), ActorConfig(policy_loss_fn="gpg"), ImportanceConfig())
    lp = torch.tensor([-1.0, -1.0], requires_grad=True)
    rest: Any = {"version": 3, "old_logprobs": None, "ref_logprobs": None, "kl_coef": 0.0}
    with pytest.raises(
        ValueError, match=f"policy_loss_fn: policy loss 'gpg' from grpo_ds .* returned {fault}.* 2 tokens"
    ):
        objective(lp, lp.detach(), BATCH, TOTALS, **rest)


def test_log_probabilities_that_are_not_finite_are_not_blamed_on_the_policy_loss() -> None:
    share, _ = call(BATCH, torch.tensor([float("nan"), -1.0], requires_grad=True))
    assert math.isnan(share.item())


def test_rejected_tokens_give_no_loss_and_stay_in_the_denominator() -> None:
    lp = torch.tensor([-1.0, -1.0 + math.log(3.0)])  # ratios to the engine 1 and 3
    plain = {"level": "off", "reject": "token"}
    assert call(BATCH, lp, importance=plain)[0].item() == pytest.approx(-1 / 8)
    assert call(BATCH, lp, importance=plain | {"reject": "sequence"})[0].item() == pytest.approx(0.0)
    # The geometric mean of 1 and 3 is 1.73; the weights of the tokens that stay are cut at 2.
    both = {"level": "token", "reject": "geometric", "reject_upper": 1.8}
    assert call(BATCH, lp, importance=both)[0].item() == pytest.approx(-(1 + 2 * 2) / 8)
    assert call(BATCH, lp, importance=both | {"reject_upper": 1.7})[0].item() == pytest.approx(0.0)


def test_statistics_merge_by_sum_and_those_named_max_by_maximum() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    merged = merge({"a": one, "b_max": two}, {"a": two, "b_max": one, "c": one})
    assert {name: value.item() for name, value in merged.items()} == {"a": 3.0, "b_max": 2.0, "c": 1.0}


def test_a_statistic_of_one_element_is_a_number_whatever_its_shape() -> None:
    given = iter([torch.tensor([2.0]), torch.tensor(3)])
    objective = Objective(lambda lp, *_: (lp, {"x": next(given)}), ActorConfig(), ImportanceConfig())
    rest: Any = {"version": 3, "old_logprobs": None, "ref_logprobs": None, "kl_coef": 0.0}
    one, other = (objective(torch.zeros(2), torch.zeros(2), BATCH, TOTALS, **rest)[1] for _ in range(2))
    assert merge(one, other)["policy/x"].item() == 5.0


def test_statistics_of_two_halves_are_those_of_the_whole() -> None:
    lp = torch.tensor([-1.25, -3.0])
    whole = call(BATCH, lp, importance={"level": "token"})[1]
    halves = [micro([1.0], [-1.0], [3]), micro([2.0], [-1.0], [2])]
    parts = [call(half, lp[i : i + 1], importance={"level": "token"})[1] for i, half in enumerate(halves)]
    merged = merge(*parts)
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-12)
