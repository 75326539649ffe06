"""Whole runs with requests in flight: stopped in the middle and resumed, no prompt is lost and none comes twice."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Launched, read_jsonl, run

ROUNDS = 8
OPTIONS = {
    "engine.kind": "vllm",
    "engine.args": json.dumps({"kv_cache_memory_bytes": 64 * 2**20}),
    "rollout.max_response_tokens": 64,
    "rollout.prompts_per_batch": 14,
    "algorithm.filter_groups.max_num_gen_batches": 0,
    "algorithm.filter_groups.max_staleness": 2,
    "actor.kl_loss_coef": 0,
    "train.micro_batch_tokens": 1024,
    "train.rounds": ROUNDS,
    "train.evaluate_every": 3,
    "run.rollouts_per_round": 10000,
}


def state(launched: Launched, rounds: int) -> tuple[dict[str, Any], set[int]]:
    """Of a checkpoint: the loop's state, and the prompts of the groups that wait."""
    folder = launched.folder / "checkpoints" / f"round-{rounds:06d}"
    carried = read_jsonl(folder / "carried-0.jsonl")
    return json.loads((folder / "trainer.json").read_text()), {group["prompt"]["index"] for group in carried}


def answered(launched: Launched) -> set[int]:
    """Prompts whose responses were generated, each with all its samples, once."""
    rows = [row for path in (launched.folder / "rollouts").glob("*.jsonl") for row in read_jsonl(path)]
    samples = Counter((row["prompt_index"], row["sample"]) for row in rows)
    assert set(samples.values()) == {1}, "answered twice"
    prompts = Counter(prompt for prompt, _ in samples)
    assert set(prompts.values()) == {4}, "all four responses"
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    return set(prompts)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("mode", "stop"), [("keep", signal.SIGKILL), ("abort", signal.SIGUSR1)])
def test_a_stopped_run_asks_again_what_was_in_flight(
    mode: str, stop: signal.Signals, recipe: Path, tmp_path: Path
) -> None:
    options = [str(word) for key, value in OPTIONS.items() for word in (f"--{key}", value)]
    arguments = ["--recipe", str(recipe), "--resume", "auto", "--sync.mode", mode, *options]
    with Launched(arguments, tmp_path, "deepspeed") as first:
        unfinished = "runs/*/checkpoints/round-*/trainer.json"

        def something_in_flight() -> bool:
            states = [json.loads(path.read_text()) for path in tmp_path.glob(unfinished)]
            return any(s["unfinished"] and s["round"] >= 2 for s in states)

        first.wait_for("a checkpoint with prompts in flight", something_in_flight, poll_s=0.005)
        if stop == signal.SIGUSR1:
            first.rank(0).send_signal(stop)
            first.wait_for_exit()
            assert "stopped: on request, after round" in first.screen
        else:
            for process in [first.rank(0), first.rank(1), *first.alive()]:
                process.kill()
        first.ends()
        assert first.rounds() < ROUNDS, "it was stopped before its end"
    done = run(arguments, tmp_path, "deepspeed")
    assert done.process.returncode == 0, done.screen
    assert f"resumed from {done.folder}" in done.screen

    metrics = read_jsonl(done.folder / "metrics.jsonl")
    assert [row["round"] for row in metrics] == list(range(ROUNDS))
    assert all(row["kept_groups"] == 4 for row in metrics)
    assert sum(row["groups/asked_again"] for row in metrics) > 0
    end, carried = state(done, ROUNDS)
    whole = answered(done)
    assert whole | set(end["unfinished"]) == set(range(end["cursor"])), "none is lost"
    assert not whole & set(end["unfinished"]) and carried <= whole
    kept = sum(row["kept_groups"] + row["dropped_groups"] for row in metrics)
    assert kept + len(carried) == len(whole), "each answered group was trained, dropped or waits"
    # Most of what was in flight at the stop was answered in the end, under the policy that was current then.
    assert max(row["logprob_gap"] for row in metrics) < 1e-3
    if mode == "keep":
        assert sum(row["groups/in_flight"] for row in metrics) > 0
        assert sum(row["groups/aborted"] for row in metrics) == 0
        assert max(row["version_lag/max"] for row in metrics) in (1, 2)
    else:
        assert sum(row["groups/aborted"] for row in metrics) > 0
        assert all(row["mixed_version_share"] == 0 for row in metrics)
