"""A run that was killed goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import TRAIN_ROWS, Launched, read_jsonl, run

KILLED_AFTER = 2


@pytest.fixture(scope="module")
def resumed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The same command as `whole_run`: killed with all its ranks after a checkpoint, and started again."""
    cwd = tmp_path_factory.mktemp("resumed")
    arguments = ["--recipe", str(recipe), "--resume", "auto"]
    checkpoint = f"runs/*/checkpoints/round-{KILLED_AFTER:06d}/trainer.json"
    with Launched(arguments, cwd, "deepspeed") as killed:
        killed.wait_for("the checkpoint", lambda: list(cwd.glob(checkpoint)), poll_s=0.005)
        for process in [killed.rank(0), killed.rank(1), *killed.alive()]:
            process.kill()
        assert killed.ends() != 0
        assert killed.rounds() >= KILLED_AFTER
    assert not list(cwd.glob("runs/*/summary.json")), "it was killed before its end"
    carried = killed.folder / "checkpoints" / f"round-{KILLED_AFTER:06d}" / "carried-0.jsonl"
    assert read_jsonl(carried), "surplus groups are carried over the kill"
    done = run(arguments, cwd, "deepspeed")
    assert done.process.returncode == 0, done.screen
    assert f"resumed from {killed.folder}" in done.screen
    return done


def last(launched: Launched, name: str) -> Path:
    return launched.folder / "checkpoints" / "round-000005" / name


def test_every_round_has_the_same_numbers(whole_run: Launched, resumed: Launched) -> None:
    first, second = (read_jsonl(launched.folder / "metrics.jsonl") for launched in (whole_run, resumed))
    assert [m["round"] for m in second] == [0, 1, 2, 3, 4]
    for one, other in zip(first, second, strict=True):
        measured = {key for key in one if not key.startswith("seconds") and "per_second" not in key}
        assert {key: one[key] for key in measured} == {key: other[key] for key in measured}


def test_every_round_has_the_same_rollouts(whole_run: Launched, resumed: Launched) -> None:
    first, second = (
        {file.name: file.read_text() for file in (launched.folder / "rollouts").iterdir()}
        for launched in (whole_run, resumed)
    )
    assert first == second


def test_the_weights_and_the_loops_state_are_the_same_at_the_end(whole_run: Launched, resumed: Launched) -> None:
    weights = "hf/model.safetensors"
    assert (whole_run.folder / weights).read_bytes() == (resumed.folder / weights).read_bytes()
    assert last(whole_run, "carried-0.jsonl").read_text() == last(resumed, "carried-0.jsonl").read_text()
    first, second = (json.loads(last(launched, "trainer.json").read_text()) for launched in (whole_run, resumed))
    for state in (first, second):
        del state["totals"]["seconds"]
    assert first == second
    assert first["cursor"] > 2 * TRAIN_ROWS, "the prompts' epoch ended on the way, twice"


def test_the_summary_counts_the_rounds_before_the_kill(whole_run: Launched, resumed: Launched) -> None:
    first, second = (json.loads((r.folder / "summary.json").read_text()) for r in (whole_run, resumed))
    del first["seconds"], second["seconds"]
    assert first == second


def refusal(arguments: list[str], cwd: Path) -> str:
    done = run(arguments, cwd)
    assert done.process.returncode == 2, done.screen
    return done.cause()


@pytest.mark.parametrize("changed", ["seed", "data"])
def test_what_would_silently_be_another_run_is_refused(
    changed: str, one_rank_run: Launched, recipe: Path, tmp_path: Path
) -> None:
    shorter = tmp_path / "train.jsonl"
    shorter.write_text("".join((recipe.parent / "train.jsonl").read_text().splitlines(keepends=True)[1:]))
    options = {
        "seed": (["--train.seed", "1"], r"train\.seed was 0 and is 1 now"),
        "data": (["--data.train", str(shorter)], r"data\.train \(token ids of all rows\) was '\w+' and is '\w+' now"),
    }
    extra, what = options[changed]
    before = sorted(one_rank_run.folder.rglob("*"))
    arguments = ["--recipe", str(recipe), "--resume", str(one_rank_run.folder), "--train.rounds", "2", *extra]
    sentence = rf".*round-000001: {what}: a resumed run keeps it; start a new run to change it"
    assert re.fullmatch(sentence, refusal(arguments, tmp_path))
    assert sorted(one_rank_run.folder.rglob("*")) == before, "the refused run's folder is untouched"


def test_a_finished_run_has_nothing_to_train(one_rank_run: Launched, recipe: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", str(recipe), "--resume", str(one_rank_run.folder), "--train.rounds", "1"]
    sentence = (
        r"--resume: .*round-000001 already holds 1 rounds and train\.rounds is 1: raise train\.rounds, or start a "
    )
    assert re.fullmatch(sentence + r"new run without --resume", refusal(arguments, tmp_path))


def test_a_run_that_was_killed_while_it_finished_delivers_its_model(
    one_rank_run: Launched, recipe: Path, tmp_path: Path
) -> None:
    """What a kill between the last checkpoint and the summary leaves: half an export, and no summary."""
    run_folder = tmp_path / "runs" / one_rank_run.folder.name
    shutil.copytree(one_rank_run.folder, run_folder)
    (run_folder / "summary.json").unlink()
    (run_folder / "hf").rename(run_folder / "hf.partial")
    (run_folder / "hf.partial" / "model.safetensors").write_bytes(bytes(1000))
    checkpoint = run_folder / "checkpoints" / "round-000001" / "trainer.json"
    written = checkpoint.stat().st_mtime_ns
    done = run(["--recipe", str(recipe), "--train.rounds", "1", "--resume", "auto"], tmp_path)
    assert done.process.returncode == 0, done.screen
    weights = "hf/model.safetensors"
    assert (run_folder / weights).read_bytes() == (one_rank_run.folder / weights).read_bytes()
    assert not (run_folder / "hf.partial").exists()
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (one_rank_run.folder, run_folder))
    del first["seconds"], second["seconds"]
    assert first == second
    assert checkpoint.stat().st_mtime_ns == written, "the checkpoint is as it was"
    assert read_jsonl(run_folder / "metrics.jsonl") == read_jsonl(one_rank_run.folder / "metrics.jsonl")


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def with_a_hole(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "code", "sentence"),
    [
        (cut_off, 2, r"{}: \w+_optim_states\.pt has \d+ of the \d+ bytes that were written: {}"),
        (with_a_hole, 1, r"RuntimeError: {}: a file of the checkpoint cannot be read \(\w+: .*\): {}"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_what_to_do(
    damage: Callable[[Path], None], code: int, sentence: str, one_rank_run: Launched, recipe: Path, tmp_path: Path
) -> None:
    copy = tmp_path / one_rank_run.folder.name
    shutil.copytree(one_rank_run.folder, copy)
    checkpoint = copy / "checkpoints" / "round-000001"
    (states,) = checkpoint.glob("*_optim_states.pt")
    damage(states)
    done = run(["--recipe", str(recipe), "--resume", str(copy), "--train.rounds", "2"], tmp_path)
    assert done.process.returncode == code, done.screen
    advice = "remove the folder, and the run goes on from the checkpoint before"
    assert re.fullmatch(sentence.format(re.escape(str(checkpoint)), advice), done.cause()), done.cause()


EVEN = """
def even(prompts, **kwargs):
    return [float(k) if int(prompt.split("+")[0]) % 2 == 0 else None for k, prompt in enumerate(prompts)]
"""
"""Every other prompt of the tiny project cannot be scored."""


@pytest.mark.slow
def test_groups_that_a_round_paid_for_outlive_its_exhaustion(recipe: Path, tmp_path: Path) -> None:
    """Of four prompts a run two can be scored; the second run adds its two, with another KL coefficient."""
    (tmp_path / "even.py").write_text(EVEN)
    arguments = ["--recipe", str(recipe), "--resume", "auto", "--train.rounds", "1", "--rollout.prompts_per_batch", "1"]
    arguments += ["--reward.functions", f"[{tmp_path / 'even.py'}:even]", "--data.shuffle", "false"]
    arguments += ["--data.heldout", "null"]
    filters = "--algorithm.filter_groups."
    arguments += [f"{filters}max_num_gen_batches", "4", f"{filters}on_exhausted", "error", f"{filters}enable", "false"]
    first = run(arguments, tmp_path)
    assert first.process.returncode == 1, first.screen
    checkpoint = first.folder / "checkpoints" / "round-000000"
    assert first.cause().endswith(f"; --resume auto goes on with the 2 groups found so far, from {checkpoint}")
    assert len(read_jsonl(checkpoint / "carried-0.jsonl")) == 2
    second = run([*arguments, "--actor.kl_loss_coef", "0.02"], tmp_path)
    assert second.process.returncode == 0, second.screen
    (metrics,) = read_jsonl(first.folder / "metrics.jsonl")
    assert (metrics["kept_groups"], metrics["generation_batches"]) == (4, 4)
    assert metrics["kl_coef"] == 0.02


def test_a_folder_without_a_checkpoint_is_refused(recipe: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cause = refusal(["--recipe", str(recipe), "--resume", str(empty)], tmp_path)
    assert cause == f"--resume {empty}: no whole checkpoint under {empty}/checkpoints; name a run's folder"
