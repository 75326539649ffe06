"""What a finished run leaves behind, and what does not depend on how the work is spread."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ds.recipe import read_recipe
from tests.e2e.harness import Launched, read_jsonl, run

ROUND_KEYS = {"round", "reward", "loss", "grad_norm", "version", "kept_groups", "dropped_groups"}
PHASES = {"logprobs", "update", "sync", "total"}


def test_the_run_folder_holds_what_the_screen_names(whole_run: Launched) -> None:
    folder = whole_run.folder
    assert folder.name.startswith("tiny-")
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.yaml", "manifest.json", "metrics.jsonl", "summary.json", "rollouts", "checkpoints", "hf"} <= names
    named = [line.split()[1] for line in whole_run.screen.splitlines() if line.startswith("  ") and str(folder) in line]
    assert len(named) == 5 and all(Path(path).exists() for path in named)


def test_the_written_recipe_reads_back_as_the_same_recipe(whole_run: Launched, recipe: Path) -> None:
    assert (
        read_recipe(["--recipe", str(whole_run.folder / "recipe.yaml")])[0] == read_recipe(["--recipe", str(recipe)])[0]
    )


def test_the_manifest_says_what_the_run_ran_on(whole_run: Launched) -> None:
    manifest = json.loads((whole_run.folder / "manifest.json").read_text())
    assert manifest["ranks"] == 2 and manifest["dtype"] in ("float32", "bfloat16")
    assert {"python", "packages", "git_commit", "git_dirty", "platform", "cpus", "memory_gib"} <= set(manifest)
    assert {"device", "accelerators"} <= set(manifest)
    assert manifest["packages"]["torch"] == importlib.metadata.version("torch")


def test_each_round_has_one_line_of_numbers(whole_run: Launched) -> None:
    rounds = read_jsonl(whole_run.folder / "metrics.jsonl")
    assert [m["round"] for m in rounds] == [0, 1, 2, 3, 4]
    assert [m["version"] for m in rounds] == [1, 2, 3, 4, 5]
    for metrics in rounds:
        assert set(metrics) >= ROUND_KEYS | {f"seconds/{phase}" for phase in PHASES}
        assert all(torch.isfinite(torch.tensor(float(metrics[key]))) for key in ROUND_KEYS)
        assert metrics["kept_groups"] == 4
        assert metrics["lr"] == 1e-3
        # The only function, unweighted, over all that was generated: null where that is nothing.
        mean = metrics["reward/mixed"]
        assert mean == pytest.approx(metrics["score_all"]) if metrics["generation_batches"] else mean is None
        # A round that lives on surplus groups alone generates nothing.
        assert (metrics["generation_batches"] > 0) == ("seconds/generation" in metrics) == ("seconds/reward" in metrics)


def test_the_summary_adds_the_rounds_up(whole_run: Launched) -> None:
    summary = json.loads((whole_run.folder / "summary.json").read_text())
    rounds = read_jsonl(whole_run.folder / "metrics.jsonl")
    assert summary["rounds"] == 5 and summary["seconds"] > 0
    for key in ("samples", "tokens_generated", "tokens_trained"):
        assert summary[key] == sum(m[key] for m in rounds) > 0
    assert 0 <= summary["heldout_before"] <= 1 and 0 <= summary["heldout_after"] <= 1
    evaluated = {str(m["round"] + 1): m["heldout"] for m in rounds if "heldout" in m}
    assert set(evaluated) == {"2", "4"}, "every second round; the last one is heldout_after"
    assert summary["heldout_at"] == evaluated


def test_every_trained_token_carries_the_version_that_made_it(whole_run: Launched) -> None:
    rounds = read_jsonl(whole_run.folder / "metrics.jsonl")
    generating = [m["round"] for m in rounds if m["generation_batches"]]
    files = sorted((whole_run.folder / "rollouts").iterdir())
    assert [file.name for file in files] == [f"round-{number:06d}-node-0.jsonl" for number in generating]
    for number, file in zip(generating, files, strict=True):
        records = read_jsonl(file)
        assert len(records) == rounds[number]["responses"] > 0
        for record in records:
            assert record["round"] == number
            assert record["versions"] == [[number, 0, record["tokens"]]]
            assert {"prompt", "response", "score", "reward", "rewards", "finish_reason", "row"} <= set(record)


def test_the_exported_model_loads_answers_and_has_learned(whole_run: Launched, recipe: Path) -> None:
    folder = whole_run.folder / "hf"
    model, before = (AutoModelForCausalLM.from_pretrained(p) for p in (folder, recipe.parent / "model"))
    ids = AutoTokenizer.from_pretrained(folder)("12+13=", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    assert model.generation_config.eos_token_id == before.generation_config.eos_token_id is not None
    assert (folder / "generation_config.json").is_file()
    old = dict(before.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(old)
    moved = [(parameter - old[name]).abs().max().item() for name, parameter in model.named_parameters()]
    # Adam moves a weight by about lr a step: 5 steps of 1e-3, and no tensor is left out or far away.
    assert all(0 < distance < 2e-2 for distance in moved)


def assert_same_first_round(one: Launched, other: Launched) -> None:
    name = "round-000000-node-0.jsonl"
    assert read_jsonl(one.folder / "rollouts" / name) == read_jsonl(other.folder / "rollouts" / name)
    carried = "checkpoints/round-000001/carried-0.jsonl"
    groups = read_jsonl(one.folder / carried)
    assert groups == read_jsonl(other.folder / carried) and groups, "token ids and log-probabilities of the surplus"
    first, second = (read_jsonl(launched.folder / "metrics.jsonl")[0] for launched in (one, other))
    for key in ("loss", "grad_norm", "reward", "logprob_gap"):
        assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-5), key
    assert first["tokens_trained"] == second["tokens_trained"]


def test_one_rank_and_small_micro_batches_give_the_same_round(whole_run: Launched, one_rank_run: Launched) -> None:
    assert_same_first_round(whole_run, one_rank_run)


def test_torchrun_and_larger_micro_batches_give_the_same_round(
    whole_run: Launched, recipe: Path, tmp_path: Path
) -> None:
    arguments = ["--recipe", str(recipe), "--train.rounds", "1", "--train.micro_batch_tokens", "512"]
    done = run(arguments, tmp_path, "torchrun")
    assert done.process.returncode == 0, done.screen
    assert_same_first_round(whole_run, done)
