"""The published DAPO recipe with what the demo model and a test need put over it; its algorithm stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.harness import ROOT, Launched, read_jsonl

DEMO = ROOT / "recipes" / "demo"
LONGEST, BUFFER, MEMBERS, PROMPTS, UPDATE = 8, 6, 4, 8, 4
"""Tokens of a response, those of the overlong buffer, responses a prompt, prompts a round and an optimizer step."""
ON_THE_DEMO = [
    *("--recipe", "dapo_qwen", "--engine.kind", "hf", "--engine.args", "{}", "--actor.deepspeed", "zero3.json"),
    *("--model.path", str(DEMO / "model"), "--model.dtype", "float32", "--model.attn_implementation", "eager"),
    *("--data.train", str(DEMO / "train.jsonl"), "--data.heldout", "null", "--data.max_prompt_tokens", "16"),
    *("--reward.functions", "[arithmetic]", "--reward.overlong_buffer_len", str(BUFFER), "--reward.workers", "1"),
    *("--rollout.n", str(MEMBERS), "--rollout.max_response_tokens", str(LONGEST), "--rollout.prompts_per_batch", "16"),
    *("--actor.lr", "1e-4", "--train.prompts_per_round", str(PROMPTS), "--train.prompts_per_update", str(UPDATE)),
    *("--train.micro_batch_tokens", "256", "--train.heldout_metric", "score"),
]


def check_dapo(done: Launched, rounds: int) -> list[dict[str, Any]]:
    """Every part of DAPO was at work in the run; returns its rollouts."""
    assert done.process.returncode == 0, done.screen
    rows = read_jsonl(done.folder / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(rounds))
    for row in rows:
        assert (row["kept_groups"], row["samples"], row["optimizer_steps"]) == (8, 32, 2)
        assert 0 < row["grad_norm"] < float("inf")
        assert row["policy/kl_old"] > 0, "the second mini-batch is compared with the policy of the round's start"
        assert "policy/dual_clip" in row
    assert sum(row["dropped/all_wrong"] + row["dropped/all_right"] for row in rows) > 0, "dynamic sampling"
    rollouts = [line for path in sorted(_files(done)) for line in read_jsonl(path)]
    for line in rollouts:
        over = max(0, line["tokens"] - (LONGEST - BUFFER)) / BUFFER
        assert line["score"] in (0.0, 2.0) and abs(line["reward"] - (line["score"] - over)) < 1e-6
    assert len({line["tokens"] for line in rollouts}) > 1, "responses of different lengths"
    return rollouts


def _files(done: Launched) -> list[Path]:
    return list((done.folder / "rollouts").glob("*.jsonl"))
