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
