"""A checkpoint goes on with another number of ranks, and the numbers do not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.harness import Launched, read_jsonl, run

# Several sub-groups a rank, as models above a billion parameters have.
SMALL_SUB_GROUPS = {"zero_optimization": {"stage": 3, "overlap_comm": False, "sub_group_size": 100_000}}
FROM = 2


def resume(first: Launched, recipe: Path, cwd: Path, launcher: str) -> Launched:
    """Goes on from round 2 of a copy of the run."""
    copy = cwd / "runs" / first.folder.name
    shutil.copytree(first.folder, copy)
    for later in (copy / "checkpoints").glob("round-*"):
        if later.name > f"round-{FROM:06d}":
            shutil.rmtree(later)
    done = run([*arguments(recipe, recipe.parent), "--resume", str(copy)], cwd, launcher)
    assert done.process.returncode == 0, done.screen
    assert f"{FROM} rounds done" in done.screen
    return done


def arguments(recipe: Path, folder: Path) -> list[str]:
    config = folder / "small_sub_groups.json"
    config.write_text(json.dumps(SMALL_SUB_GROUPS))
    return ["--recipe", str(recipe), "--actor.deepspeed", str(config)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after"), [("deepspeed", "python"), ("python", "deepspeed")])
def test_the_rounds_after_are_those_of_the_run_that_never_stopped(
    before: str, after: str, recipe: Path, tmp_path: Path
) -> None:
    """deepspeed starts two ranks, python one."""
    (tmp_path / "whole").mkdir()
    whole = run(arguments(recipe, tmp_path), tmp_path / "whole", before)
    assert whole.process.returncode == 0, whole.screen
    (tmp_path / "resumed").mkdir()
    resumed = resume(whole, recipe, tmp_path / "resumed", after)

    expected, found = (read_jsonl(launched.folder / "metrics.jsonl") for launched in (whole, resumed))
    assert [m["round"] for m in found] == [0, 1, 2, 3, 4]
    for one, other in zip(expected[FROM:], found[FROM:], strict=True):
        for key in ("loss", "reward", "score_all", "kl", "kept_groups", "tokens_trained"):
            assert other[key] == pytest.approx(one[key], abs=1e-5), key
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_run_that_is_ended_during_the_conversion_leaves_no_process_and_can_start_again(
    one_rank_run: Launched, recipe: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "runs" / one_rank_run.folder.name
    shutil.copytree(one_rank_run.folder, copy)
    arguments = ["--recipe", str(recipe), "--resume", str(copy), "--train.rounds", "2"]
    with Launched(arguments, tmp_path, "deepspeed") as ended:
        converts = "deepspeed.checkpoint.ds_to_universal"
        ended.wait_for("the conversion", lambda: any(converts in p.cmdline() for p in ended.alive()))
        ended.process.terminate()
        assert ended.ends() != 0
    checkpoint = copy / "checkpoints" / "round-000001"
    assert not (checkpoint / "universal").exists(), "it was ended too late to show anything"
    again = run(arguments, tmp_path, "deepspeed")
    assert again.process.returncode == 0, again.screen
    assert (checkpoint / "universal").is_dir() and not list(checkpoint.glob("*.partial"))
