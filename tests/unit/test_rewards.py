"""The pure parts of the rewards: built-ins, lookup, weighted sum, overlong penalty, and what a call may return."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from grpo_ds.config import RecipeError, RewardConfig
from grpo_ds.plugins import list_plugins
from grpo_ds.rewards import make_group, soft_overlong_penalty, weighted_score, worker
from grpo_ds.rewards.builtin import arithmetic, exact_match, gsm8k
from grpo_ds.rewards.resolve import function_names, resolve
from grpo_ds.types import Prompt, Rollout, VersionSpan


def rollout(tokens: int) -> Rollout:
    return Rollout(
        token_ids=(5,) * tokens,
        logprobs=(0.0,) * tokens,
        finish_reason="stop",
        spans=(VersionSpan(0, 0, tokens),),
        text="x",
    )


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (80, 0.0), (85, -0.5), (90, -1.0), (100, -2.0), (130, -2.0)])
def test_the_overlong_penalty_falls_linearly_over_the_buffer(length: int, penalty: float) -> None:
    # f 2, L_max 100, B 20: the buffer begins at 80, so 85 is a quarter of the way to -2.
    assert soft_overlong_penalty(length, max_response_tokens=100, buffer_len=20, factor=2.0) == penalty


def test_a_buffer_of_zero_turns_the_penalty_off() -> None:
    assert soft_overlong_penalty(100, max_response_tokens=100, buffer_len=0, factor=2.0) == 0.0


def test_the_score_is_the_weighted_sum_of_what_could_be_scored() -> None:
    assert weighted_score([1.0, 0.5], [2.0, 4.0]) == 4.0
    assert weighted_score([None, 0.5], [2.0, 4.0]) == 2.0
    assert weighted_score([None, None], [2.0, 4.0]) is None
    assert weighted_score([None, 37.0], [1.0, 0.0]) is None, "what is only measured says nothing of the response"
    assert weighted_score([0.0, 37.0], [1.0, 0.0]) == 0.0


def test_a_group_shapes_the_reward_and_leaves_the_score_alone() -> None:
    config = RewardConfig(functions=["f", "g"], weights=[1.0, 3.0], overlong_buffer_len=4, overlong_penalty_factor=1.0)
    prompt = Prompt(index=0, row=0, token_ids=(1,), text="p", columns={})
    parts: list[dict[str, float | None]] = [{"f": 1.0, "g": 1.0}, {"f": 1.0, "g": None}, {"f": None, "g": None}]
    group = make_group(prompt, [rollout(9), rollout(2), rollout(10)], parts, config, max_response_tokens=10)
    # 9 tokens: (9 - 6) / 4 of the penalty 1.
    assert [(m.score, m.reward) for m in group.members] == [(4.0, 3.25), (1.0, 1.0), (None, None)]
    assert group.members[1].parts == {"f": 1.0, "g": None}


def test_arithmetic_wants_the_answer_and_nothing_else() -> None:
    assert arithmetic([" 7\n", "7 8", "", "17"], answer=[7, 7, 7, "7"]) == [1.0, 0.0, 0.0, 0.0]
    assert arithmetic(["7"], answer=[None]) == [None]
    assert arithmetic([[{"role": "assistant", "content": "7"}]], answer=[7]) == [1.0]


def test_exact_match_takes_the_last_number_or_the_last_line() -> None:
    completions = ["first 3, then 1,200.0", "7 or 8", "no number", "thinking\nParis ", "London", ""]
    truths = ["1200", "7", "5", "paris", "paris", "paris"]
    assert exact_match(completions, ground_truth=truths) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert exact_match(["7"], solution=["3 + 4\n#### 7"]) == [1.0]
    assert exact_match(["7"], solution=[None]) == [None]


@pytest.mark.parametrize(
    ("completion", "truth", "value"),
    [
        ("Range 3-5", "5", 1.0),
        ("Range 3-5", "-5", 0.0),
        ("(2)-5", "5", 1.0),
        ("x[1]-5", "5", 1.0),
        ("GPT-4", "4", 1.0),
        ("x = -5", "-5", 1.0),
        ("-5", "-5", 1.0),
        ("(-5)", "-5", 1.0),
        ("3 - 5", "5", 1.0),
        ("\u22127", "-7", 1.0),
        ("\u22127", "7", 0.0),
        ("-7", "\u22127", 1.0),
        ("3\u22127", "7", 1.0),
        ("-.5", "-0.5", 1.0),
    ],
)
def test_a_minus_is_a_sign_where_nothing_stands_right_before_it(completion: str, truth: str, value: float) -> None:
    assert exact_match([completion], answer=[truth]) == [value]
    assert gsm8k([f"#### {truth}"], answer=[truth]) == [1.0]


def test_gsm8k_reads_the_marked_answer_only() -> None:
    completions = ["#### 5 no, #### 72", "72", "#### 71", "#### 1,072.00"]
    assert gsm8k(completions, answer=["x\n#### 72", "#### 72", "#### 72", "#### 1072"]) == [1.0, 0.0, 0.0, 1.0]
    assert gsm8k(["#### 1", "#### 1"], answer=[None, "none"]) == [None, None]


def test_a_builtin_without_ground_truth_column_says_which_are_read() -> None:
    with pytest.raises(ValueError, match="gsm8k needs a data column named answer, ground_truth or solution"):
        gsm8k(["1"])


def test_functions_are_found_by_name_by_dotted_path_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(completions):\n    return [1.0 for _ in completions]\n")
    assert resolve("gsm8k", []) is gsm8k
    assert resolve("grpo_ds.rewards.builtin.gsm8k", []) is gsm8k
    assert resolve("mine.py:short", [tmp_path / "nowhere", tmp_path])(completions=["a"]) == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gsm9k", "no reward is called 'gsm9k', did you mean 'gsm8k'.* .there are: arithmetic, exact_match, gsm8k"),
        ("no_such_package.f", "importing no_such_package failed with ModuleNotFoundError"),
        ("grpo_ds.rewards.builtin.g", "has no attribute 'g'"),
        ("gone.py:f", "plugin file gone.py does not exist"),
        ("mine.py:g", "has no attribute 'g'"),
        ("mine.py:number", "is a int, not a class or a function"),
        ("mine.py:slow", "is an async function"),
        ("mine.py:positional", "takes 'completions' by position only"),
    ],
)
def test_what_is_no_reward_function_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(
        "number = 3\nasync def slow(completions): return []\ndef positional(completions, /): return []\n"
    )
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(spec, [tmp_path])
    assert str(caught.value).startswith("reward.functions: ")


def test_rewards_of_installed_packages_are_listed_with_the_built_in_ones() -> None:
    rows = {row.name: row for row in list_plugins("grpo_ds.rewards")}
    assert {"arithmetic", "exact_match", "gsm8k"} <= set(rows)
    assert all(row.problem is None and row.doc and not row.options for row in rows.values())


def test_names_are_short_and_unique() -> None:
    assert function_names(["gsm8k", "a/b.py:f", "p.q.g"]) == ["gsm8k", "f", "g"]
    assert function_names(["a.py:f", "b.py:f", "p.g"]) == ["a.py:f", "b.py:f", "g"]


def test_a_function_called_score_is_not_taken_for_the_weighted_sum() -> None:
    assert function_names(["rewards/mine.py:score", "p.g"]) == ["rewards/mine.py:score", "g"]
    with pytest.raises(RecipeError, match="reward.functions names 'score', which stands for the weighted sum"):
        RewardConfig(functions=["g", "score"])


def test_a_function_that_is_named_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"names 'a.py:f' twice: name it once, and weight it with reward.weights"):
        RewardConfig(functions=["a.py:f", "b.py:f", "a.py:f"])


class Unfloatable(float):
    def __float__(self) -> float:
        raise RuntimeError("no float")


class Unprintable:
    def __repr__(self) -> str:
        raise KeyError("no repr")


def call(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], **keywords: list[Any]) -> worker.CallResult:
    monkeypatch.setattr(worker, "_functions", [function])
    monkeypatch.setattr(worker, "_names", ["f"])
    return worker.call(0, {"prompts": ["p", "p"], "completions": ["a", "b"], "completion_ids": [[1], [2]], **keywords})


def test_a_function_gets_the_keywords_it_names_and_all_with_kwargs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def narrow(completions: list[str], answer: list[int]) -> list[float]:
        seen.append(completions)
        return [float(a) for a in answer]

    def wide(**keywords: Any) -> list[float]:
        seen.append(sorted(keywords))
        return [0.0, 0.0]

    assert call(monkeypatch, narrow, answer=[3, 4], other=[0, 0]).values == (3.0, 4.0)
    assert call(monkeypatch, wide, answer=[3, 4]).values == (0.0, 0.0)
    assert seen == [["a", "b"], ["answer", "completion_ids", "completions", "prompts"]]


def test_a_keyword_that_the_data_lacks_is_a_mistake_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call(monkeypatch, lambda completions, solution: [0.0, 0.0], answer=[1, 2])
    assert result.status == "recipe"
    assert "f needs the keyword 'solution', but the data offers only answer, completion_ids," in result.message


@pytest.mark.parametrize(
    ("returned", "status", "message"),
    [
        ([1.0], "count", "returned 1 values for 2 completions"),
        ([1.0] * 3, "count", "returned 3 values for 2 completions"),
        (1.0, "count", "returned a float instead of a list"),
        ([1.0, float("nan")], "value", "returned nan, which is no score"),
        ([1.0, float("-inf")], "value", "returned -inf, which is no score"),
        ([1.0, "1"], "value", "returned a str ('1') where a number or None is needed"),
        ([1.0, 10**400], "value", "returned a int that is no number: OverflowError: int too large"),
        ([1.0, Unfloatable()], "value", "returned a Unfloatable that is no number: RuntimeError: no float ("),
        ([1.0, Unprintable()], "value", "returned a Unprintable that is no number: KeyError: 'no repr' ("),
    ],
)
def test_wrong_values_are_named_and_never_repaired(
    monkeypatch: pytest.MonkeyPatch, returned: Any, status: str, message: str
) -> None:
    result = call(monkeypatch, lambda completions: returned)
    assert (result.status, result.values) == (status, ())
    assert message in result.message
    assert result.position == (1 if status == "value" else 0)


def test_numbers_of_any_kind_and_none_are_values(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, lambda completions: [True, None]).values == (1.0, None)
    assert call(monkeypatch, lambda completions: [numpy.float32(0.5), 2]).values == (0.5, 2.0)


def test_the_reward_process_imports_no_torch() -> None:
    code = (
        "import sys, grpo_ds.rewards.worker\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
