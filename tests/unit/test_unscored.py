"""Responses on which a reward function fails, or to which one does not apply: real functions, filter and estimator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_ds.config import RewardConfig
from grpo_ds.estimators import get_estimator
from grpo_ds.filters import keep_group
from grpo_ds.records import group_from_json, group_to_json
from grpo_ds.rewards import RewardPool
from grpo_ds.samples import AdvantageStage
from grpo_ds.types import Group, Prompt, Rollout, VersionSpan

FUNCTIONS = """
def verifier(completions):
    if "crash" in completions:
        raise RecursionError("deep")
    return [None if c == "skip" else float(c != "wrong") for c in completions]

def tidy(completions):
    return [1.0 for _ in completions]
"""


def scored(folder: Path, *texts: str) -> Group:
    """Judged by a verifier, and by a function with a tenth of its weight that has a value for everything."""
    (folder / "mine.py").write_text(FUNCTIONS)
    config = RewardConfig(
        functions=["mine.py:verifier", "mine.py:tidy"], weights=[1.0, 0.1], on_error="unscored", workers=1
    )
    rollouts = [Rollout((1,), (0.0,), "stop", (VersionSpan(0, 0, 1),), text) for text in texts]
    with RewardPool(config, [folder]) as pool:
        (group,) = pool.score_groups([(Prompt(0, 0, (1,), "p", {}), rollouts)], max_response_tokens=4)
        stats = pool.take_stats()
    assert (stats["verifier"].errors, stats["tidy"].unscored) == (texts.count("crash"), 0)
    return group


def test_a_right_answer_whose_check_crashed_is_no_wrong_answer(tmp_path: Path) -> None:
    """The 0.1 that `tidy` gives it would keep a group in which all that is known is right."""
    group = scored(tmp_path, "7", "7", "crash", "7")
    assert [(m.score, m.reward) for m in group.members] == [(1.1, 1.1), (1.1, 1.1), (None, None), (1.1, 1.1)]
    assert group.members[2].parts == {"verifier": None, "tidy": 1.0}
    assert [m.metric("tidy") for m in group.members] == [1.0, 1.0, None, 1.0], "no evaluation counts it either"
    assert keep_group([m.score for m in group.members]).reason == "all_right"


def test_a_response_whose_check_crashed_changes_no_advantage_and_is_counted(tmp_path: Path) -> None:
    group = scored(tmp_path, "7", "wrong", "crash")
    assert keep_group([m.score for m in group.members]).keep
    stage = AdvantageStage(get_estimator("grpo"))
    # Scores 1.1 and 0.1: each is 0.5 from the mean, and the standard deviation (ddof 1) is the square root of 0.5.
    found = [sample.advantages[-1].item() for sample in stage([group])]
    assert found == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-4)
    assert stage.left_out([group])["unscored"] == 1
    assert group_from_json(json.loads(json.dumps(group_to_json(group)))) == group, "a checkpoint remembers it"


def test_a_function_without_a_value_leaves_the_score_to_the_others(tmp_path: Path) -> None:
    group = scored(tmp_path, "skip", "7")
    assert [(m.score, m.failed) for m in group.members] == [(0.1, False), (1.1, False)]
