"""The run's files after a kill, and what they say of the machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from grpo_ds import runlog
from grpo_ds.config import RecipeError
from grpo_ds.records import replace_folder, write_whole
from grpo_ds.runlog import RunLog, settings_that_must_match
from tests.unit.test_run_folder import recipe_in


def log_of(folder: Path, first_round: int) -> RunLog:
    return RunLog(folder, recipe_in(folder), is_main=True, node=0, first_round=first_round)


@pytest.mark.parametrize("torn", ["", '{"round": 2, "rew', '{"round": 2}'])
def test_a_resumed_run_forgets_the_rounds_it_repeats_and_half_a_line(torn: str, tmp_path: Path) -> None:
    """The last one is a whole object, but of a line whose end was not written."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\n{"round": 1, "x": "a"}\n{"round": 2}\n' + torn)
    log_of(tmp_path, 2)
    assert path.read_text() == '{"round": 0}\n{"round": 1, "x": "a"}\n'
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "recipe.yaml", "rollouts"}


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\nnonsense\n{"round": 1}\n')
    with pytest.raises(RecipeError, match=r"metrics\.jsonl:2 is no line of metrics"):
        log_of(tmp_path, 2)
    assert path.read_text().count("\n") == 3, "nothing is lost"


def test_the_manifest_tells_the_accelerators_and_whether_the_code_is_the_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, timeout=30)

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-m", "x")
    monkeypatch.setattr(runlog, "ROOT", tmp_path)
    found = runlog.manifest(4, "cuda", "bfloat16", ["H100", "H100"])
    assert found["accelerators"] == {"H100": 2} and len(found["git_commit"]) == 40
    assert found["git_dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert runlog.manifest(4, "cpu", "float32", [])["git_dirty"] is True
    monkeypatch.setattr(runlog, "ROOT", tmp_path / "nothing")
    assert runlog.manifest(4, "cpu", "float32", [])["git_dirty"] is None


def test_what_carried_groups_depend_on_must_match(tmp_path: Path) -> None:
    values = settings_that_must_match(recipe_in(tmp_path), "abc", greedy_baseline=True)
    assert values["reward.functions"] == ["f"] and values["rollout.temperature"] == 1.0
    assert {"reward.weights", "rollout.top_p", "rollout.top_k", "reward.overlong_buffer_len"} <= set(values)
    assert values["algorithm.adv_estimator (needs a greedy response)"] is True
    assert json.loads(json.dumps(values)) == values, "a checkpoint keeps them as JSON"


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "first")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "second")
    assert path.read_text() == "first"


def test_a_folder_takes_the_place_of_an_earlier_one_and_of_what_a_kill_left(tmp_path: Path) -> None:
    for name in ("hf", "hf.partial", "hf.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    replace_folder(tmp_path / "hf.partial", tmp_path / "hf")
    assert (tmp_path / "hf" / "which").read_text() == "hf.partial"
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
