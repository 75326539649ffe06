"""Plans and micro-batches: every sample once, equal numbers of passes, the token budget, and where each token goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ds.batching import SampleSize, collate, plan_updates
from grpo_ds.types import Sample


def plan(sizes: list[SampleSize], **options: Any) -> Any:
    defaults = {"world": 1, "budget": 100, "layout": "packed", "groups_per_update": 99, "max_response_tokens": 8}
    return plan_updates(sizes, **{**defaults, **options})


def sample(ids: list[int], mask: list[int], prompt: int = 0) -> Sample:
    length = len(ids)
    return Sample(
        prompt,
        torch.tensor(ids),
        torch.tensor(mask, dtype=torch.bool),
        -torch.arange(length) / 10,
        torch.arange(length) * 1.0,
        torch.tensor(mask) * 3,
    )


SIZES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(2, 30), st.integers(0, 30)).map(
        lambda drawn: SampleSize(drawn[0], drawn[1], min(drawn[1] - 1, drawn[2]))
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(30, 120), st.sampled_from(["padded", "packed"]), st.integers(1, 4))
def test_every_sample_is_trained_once_in_its_step_within_the_budget_and_ranks_agree(
    sizes: list[SampleSize], world: int, budget: int, layout: str, per_update: int
) -> None:
    steps = plan(sizes, world=world, budget=budget, layout=layout, groups_per_update=per_update)
    groups = sorted({size.group for size in sizes})
    assert len(steps) == -(-len(groups) // per_update)
    for k, step in enumerate(steps):
        members = [i for i, s in enumerate(sizes) if s.group in groups[k * per_update : (k + 1) * per_update]]
        assert len(step.micro_batches) == world
        assert len({len(rank) for rank in step.micro_batches}) == 1
        assert sorted(i for rank in step.micro_batches for micro in rank for i in micro) == members
        assert step.samples == len(members)
        assert step.totals.tokens == sum(sizes[i].response_tokens for i in members)
        assert step.totals.sequences == len([i for i in members if sizes[i].response_tokens])
        for micro in (m for rank in step.micro_batches for m in rank if m):
            lengths = [sizes[i].tokens for i in micro]
            assert (len(micro) * max(lengths) if layout == "padded" else sum(lengths)) <= budget


def test_padding_counts_in_the_padded_layout_and_not_in_the_packed_one() -> None:
    sizes = [SampleSize(0, 8, 1), SampleSize(0, 2, 1), SampleSize(0, 2, 1)]
    assert plan(sizes, budget=12, layout="packed")[0].micro_batches == (((0, 1, 2),),)
    # Padded to 8 the three would take 24.
    assert plan(sizes, budget=12, layout="padded")[0].micro_batches == (((0,), (1, 2)),)


def test_ranks_get_about_the_same_number_of_tokens() -> None:
    sizes = [SampleSize(0, 2 + 7 * i % 50, 1) for i in range(64)]
    (step,) = plan(sizes, world=4, budget=128)
    loads = [sum(sizes[i].tokens for micro in rank for i in micro) for rank in step.micro_batches]
    assert max(loads) - min(loads) <= 0.1 * max(loads)


def test_groups_are_taken_in_order_and_never_split_over_steps() -> None:
    sizes = [SampleSize(9, 4, 1), SampleSize(2, 4, 1), SampleSize(9, 4, 1), SampleSize(5, 4, 1)]
    steps = plan(sizes, groups_per_update=2)
    assert [sorted(i for rank in s.micro_batches for m in rank for i in m) for s in steps] == [[1, 3], [0, 2]]


def test_fewer_samples_than_ranks_leave_empty_micro_batches() -> None:
    (step,) = plan([SampleSize(0, 4, 2)], world=3)
    assert sorted(step.micro_batches) == [((),), ((),), ((0,),)]


def test_a_sample_above_the_budget_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 101 tokens, above train.micro_batch_tokens \(100\)"):
        plan([SampleSize(0, 100, 1), SampleSize(0, 101, 1)])


A = sample([11, 12, 13, 14], [0, 0, 1, 1])
B = sample([21, 22], [0, 0])
C = sample([31, 32, 33], [0, 1, 0])


def test_the_padded_layout_by_hand() -> None:
    batch = collate([A, B, C], "padded", pad_id=7)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14], [21, 22, 7, 7], [31, 32, 33, 7]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 0]]
    assert batch.targets.tolist() == [13, 14, 32]
    assert batch.predictor.tolist() == [1, 2, 8]
    assert batch.sequence_index.tolist() == [0, 0, 1]  # B has no response token and is not counted
    assert batch.advantages.tolist() == [2.0, 3.0, 1.0]
    assert batch.rollout_logprobs.tolist() == pytest.approx([-0.2, -0.3, -0.1])
    assert batch.versions.tolist() == [3, 3, 3]


def test_the_packed_layout_by_hand() -> None:
    batch = collate([A, B, C], "packed")
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.attention_mask is None
    assert batch.predictor.tolist() == [1, 2, 6]
    assert batch.targets.tolist() == [13, 14, 32]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_both_layouts_predict_each_target_from_the_token_before_it(layout: Any) -> None:
    batch = collate([C, A, B, A], layout)
    before = batch.input_ids.flatten()[batch.predictor]
    assert list(zip(before.tolist(), batch.targets.tolist(), strict=True)) == [(31, 32), *2 * [(12, 13), (13, 14)]]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_no_sample_gives_a_batch_that_runs_and_has_no_response_token(layout: Any) -> None:
    batch = collate([], layout)
    assert batch.input_ids.numel() > 0
    for name in ("predictor", "targets", "sequence_index", "rollout_logprobs", "advantages", "versions"):
        assert getattr(batch, name).shape == (0,)
    assert (batch.predictor.dtype, batch.targets.dtype, batch.advantages.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )


def test_moving_a_batch_keeps_every_field() -> None:
    batch = collate([A, C], "packed")
    moved = batch.to("cpu")
    assert moved.attention_mask is None
    assert all(torch.equal(getattr(moved, n), getattr(batch, n)) for n in batch.__slots__ if n != "attention_mask")


def test_arrays_of_another_length_and_a_response_at_the_first_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt 4: advantages has shape \(3,\), token_ids has 4 tokens"):
        collate([replace(A, prompt_index=4, advantages=torch.zeros(3))], "packed")
    with pytest.raises(ValueError, match="prompt 5: the first token cannot be a response token"):
        collate([sample([1, 2], [1, 1], prompt=5)], "padded")
