"""Groups -> samples, their wire form, the JSON form of groups, and seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ds.estimators import get_estimator
from grpo_ds.records import chosen, group_from_json, group_to_json, read_groups, readable, write_groups
from grpo_ds.samples import AdvantageStage, decode, encode, token_rewards
from grpo_ds.seeds import derive_seed
from grpo_ds.types import Group, Prompt, Rollout, Sample, Scored, VersionSpan


def member(tokens: list[int], reward: float | None, *, finish: Any = "stop", parts: Any = None) -> Scored:
    logprobs = tuple(-t / 100 for t in tokens)
    cut = len(tokens) // 2
    spans = (VersionSpan(4, 0, cut), VersionSpan(5, cut, len(tokens)))
    return Scored(Rollout(tuple(tokens), logprobs, finish, spans, "ä text"), reward, reward, parts or {"f": reward})


PROMPT = Prompt(17, 3, (1, 2, 3), "question", {"answer": "4"})
GROUP = Group(PROMPT, (member([10, 11], 1.0), member([12, 13, 14], 3.0, finish="length"), member([15], None)))
CENTRED = AdvantageStage(get_estimator("dr_grpo"))


def test_rewards_sit_on_the_last_response_token() -> None:
    rewards, mask = token_rewards(GROUP.members[:2])
    assert rewards.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 3.0]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def test_a_sample_is_the_prompt_then_the_response_with_everything_per_token_in_place() -> None:
    first, second = CENTRED([GROUP])
    assert second.token_ids.tolist() == [1, 2, 3, 12, 13, 14]
    assert second.response_mask.tolist() == [False] * 3 + [True] * 3
    assert second.rollout_logprobs.tolist() == pytest.approx([0, 0, 0, -0.12, -0.13, -0.14])
    assert second.versions.tolist() == [-1, -1, -1, 4, 5, 5]
    # The mean reward is 2: the member that cannot be scored does not enter it.
    assert second.advantages.tolist() == [0, 0, 0, 1, 1, 1]
    assert first.advantages.tolist() == [0, 0, 0, -1, -1]
    assert first.prompt_index == 17


def test_truncated_responses_give_no_loss_but_count_in_the_group() -> None:
    first, second = AdvantageStage(get_estimator("dr_grpo"), mask_truncated=True)([GROUP])
    assert not second.response_mask.any()
    assert first.response_mask.sum() == 2
    assert first.advantages[-1] == -1.0


def test_an_aborted_response_without_a_token_is_left_out_of_statistics_drafts_and_loss() -> None:
    nothing = Scored(Rollout((), (), "abort", (), ""), 9.0, 9.0, {"f": 9.0})
    group = replace(GROUP, members=(nothing, *GROUP.members))
    # The mean of the others is 2; their rows do not move.
    assert [s.advantages[-1].item() for s in CENTRED([group])] == [-1.0, 1.0]
    assert [s.token_ids.numel() for s in CENTRED.drafts([group])] == [5, 6]
    assert [s.advantages[-1].item() for s in CENTRED([group], [torch.zeros(2), torch.zeros(3)])] == [-1.0, 1.0]
    assert CENTRED([replace(GROUP, members=(nothing, nothing))]) == []
    # What is left of the group counts where the estimator needs a smallest size.
    three = AdvantageStage(get_estimator("dr_grpo"), min_group_size=3)
    assert three([group]) == []


def test_an_aborted_response_with_tokens_is_trained_on_like_any_other() -> None:
    group = replace(GROUP, members=(member([10], 1.0, finish="abort"), member([11, 12], 3.0)))
    assert [s.advantages[-1].item() for s in CENTRED([group])] == [-1.0, 1.0]


def test_penalties_are_taken_off_the_token_rewards() -> None:
    seen: list[Tensor] = []

    def spy(rewards: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(rewards.clone())
        return rewards, rewards

    AdvantageStage(spy)([GROUP], [torch.tensor([0.5, 0.25]), torch.tensor([1.0, 0.0, 0.0])])
    assert seen[0].tolist() == [[-0.5, 0.75, 0.0], [-1.0, 0.0, 3.0]]


def test_a_wrong_number_of_penalties_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        CENTRED([GROUP], [torch.zeros(2)])


def test_a_rank_without_groups_calls_the_estimator_where_it_looks_at_the_whole_batch() -> None:
    calls: list[list[float]] = []

    def all_reduce(values: Tensor) -> Tensor:
        calls.append(values.tolist())
        return values

    for name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "gpg"):
        calls.clear()
        stage = AdvantageStage(get_estimator(name), all_reduce=all_reduce)
        assert stage([]) == []
        without = len(calls)
        stage([GROUP])
        assert without == len(calls) - without > 0
    assert CENTRED([]) == []


def test_gdpo_gets_each_functions_values_and_skips_members_that_lack_one() -> None:
    seen: dict[str, Any] = {}

    def spy(rewards: Tensor, mask: Tensor, index: Tensor, **needs: Tensor) -> tuple[Tensor, Tensor]:
        seen.update(needs)
        return rewards, rewards

    members = (member([1], 1.0, parts={"f": 2.0, "g": 3.0}), member([1], 1.0, parts={"f": 2.0, "g": None}))
    made = AdvantageStage(spy, functions=("g", "f"))([Group(PROMPT, members)])
    assert len(made) == 1
    assert seen["function_rewards"].tolist() == [[3.0, 2.0]]


def test_remax_gets_the_greedy_reward_of_each_samples_group_and_drops_groups_without_one() -> None:
    stage = AdvantageStage(get_estimator("remax"), greedy_baseline=True)
    with_baseline = replace(GROUP, baseline=member([9], 0.5))
    made = stage([with_baseline, GROUP])
    assert [s.advantages[-1].item() for s in made] == [0.5, 2.5]


def test_members_that_are_left_out_are_counted_by_reason() -> None:
    nothing = Scored(Rollout((), (), "abort", (), ""), 1.0, 1.0, {"f": 1.0, "g": 1.0})
    members = (
        *(nothing, member([1], None), member([1], 2.0, parts={"f": 2.0, "g": None})),
        *(member([1], 1.0, parts={"f": 1.0, "g": 1.0}), member([1], 3.0, parts={"f": 2.0, "g": 1.0})),
    )
    groups = [Group(PROMPT, members), Group(PROMPT, members[:4])]
    stage = AdvantageStage(get_estimator("gdpo"), functions=("f", "g"), min_group_size=2)
    assert stage.left_out(groups) == {
        **{"no_tokens": 2, "unscored": 2, "unscored_part": 2, "no_baseline": 0},
        "small_group": 1,  # of the second group one is left
    }
    assert len(stage.trainable(groups[0])) == 2 and stage.trainable(groups[1]) == []
    greedy = AdvantageStage(get_estimator("remax"), greedy_baseline=True)
    assert greedy.left_out([GROUP])["no_baseline"] == 3


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (ONES, "a Tensor"),
        ((torch.ones(2), ONES), r"advantages of shape \(2,\) and type torch.float32"),
        ((ONES.long(), ONES), r"advantages of shape \(2, 3\) and type torch.int64"),
        (
            (torch.tensor([[1.0, 1.0, 0.0], [1.0, float("nan"), 1.0]]), ONES),
            "an advantage of sample 1 that is not finite",
        ),
        ((ONES, ONES), "advantages other than 0 on 1 tokens outside the mask"),
        (([[1.0]], ONES), "a tuple"),
    ],
)
def test_an_estimator_that_breaks_its_contract_is_named(result: Any, fault: str) -> None:
    stage = AdvantageStage(lambda *_: result, label="estimator 'mine' from pack 1.0")
    with pytest.raises(ValueError, match=f"estimator 'mine' from pack 1.0 returned {fault}: it must return"):
        stage([GROUP])


def test_drafts_are_the_same_sequences_without_advantages() -> None:
    stage = AdvantageStage(get_estimator("dr_grpo"), mask_truncated=True)
    drafts, made = stage.drafts([GROUP]), CENTRED([GROUP])
    assert len(drafts) == len(made)
    for draft, real in zip(drafts, made, strict=True):
        assert torch.equal(draft.token_ids, real.token_ids)
        assert torch.equal(draft.response_mask, real.response_mask)
        assert not draft.advantages.any()


def same(first: Sample, second: Sample) -> bool:
    names = ("token_ids", "response_mask", "rollout_logprobs", "advantages", "versions")
    pairs = [(getattr(first, n), getattr(second, n)) for n in names]
    return first.prompt_index == second.prompt_index and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_samples_survive_the_wire_in_order_and_no_samples_are_no_bytes() -> None:
    made = CENTRED([GROUP])
    back = decode(encode(made))
    assert len(back) == 2
    assert all(map(same, back, made))
    assert encode([]) == b""
    assert decode(b"") == []


def test_samples_cost_about_25_bytes_a_token_on_the_wire() -> None:
    rollout = Rollout((5,) * 1000, (-1.0,) * 1000, "stop", (VersionSpan(0, 0, 1000),), "")
    made = CENTRED([Group(PROMPT, (Scored(rollout, 1.0, 1.0, {}),))])
    assert len(encode(made)) < 27 * 1003


def test_a_group_is_equal_after_json_and_a_file(tmp_path: Path) -> None:
    group = replace(GROUP, baseline=member([9], 0.25))
    assert group_from_json(group_to_json(group)) == group
    write_groups(tmp_path / "groups.jsonl", [group, GROUP])
    assert read_groups(tmp_path / "groups.jsonl") == [group, GROUP]
    write_groups(tmp_path / "none.jsonl", [])
    assert read_groups(tmp_path / "none.jsonl") == []


def test_whole_groups_are_chosen_for_the_record_whatever_was_finished_first() -> None:
    groups = [replace(GROUP, prompt=replace(PROMPT, index=k)) for k in range(40)]  # of 3 responses each
    picked = [g.prompt.index for g in chosen(groups, 10, 0, "record", 5)]
    assert len(picked) == 4 and picked == sorted(picked) and picked != [0, 1, 2, 3]
    assert [g.prompt.index for g in chosen(groups[::-1], 10, 0, "record", 5)] == picked
    assert [g.prompt.index for g in chosen(groups, 10, 0, "record", 6)] != picked
    assert (len(chosen(groups, 1, 0)), chosen(groups, 0, 0), len(chosen(groups, 999, 0))) == (1, [], 40)


def test_readable_records_are_flat_one_a_response() -> None:
    rows = list(readable(GROUP, 6))
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert rows[1]["round"] == 6
    assert rows[1]["prompt_index"] == 17
    assert rows[1]["tokens"] == 3
    assert rows[1]["versions"] == [[4, 0, 1], [5, 1, 3]]
    assert rows[2]["score"] is None


def test_the_versions_of_a_group_are_those_of_its_tokens() -> None:
    assert GROUP.versions == {4, 5}
    # The third member is one token, whose first span is empty.
    assert replace(GROUP, members=GROUP.members[2:]).versions == {5}


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    seeds = {
        derive_seed(run, purpose, r, p) for run in (0, 1) for purpose in "ab" for r in range(20) for p in range(20)
    }
    assert len(seeds) == 2 * 2 * 20 * 20
    assert all(0 <= s < 2**31 for s in seeds)
    # SHA-256 of "0/rollout/1/7": a change of the function would change every run.
    assert derive_seed(0, "rollout", 1, 7) == derive_seed("0", "rollout", "1", "7")
    assert derive_seed(1, 23) != derive_seed(12, 3)
    spread = [derive_seed("x", i) / 2**31 for i in range(2000)]
    assert math.isclose(sum(spread) / 2000, 0.5, abs_tol=0.03)
