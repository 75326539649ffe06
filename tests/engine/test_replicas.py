"""Two vLLM servers behind a real run: one is killed while it generates, the other is stopped, and the run finishes."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from pathlib import Path

import httpx
import psutil
import pytest

from grpo_ds.engine.base import KEY_VARIABLE
from tests.e2e.harness import Launched, read_jsonl, write_project

ROUNDS = 8
OPTIONS = {
    "engine.kind": "vllm",
    "engine.replicas": 2,
    "engine.max_restarts": 5,
    "engine.stall_timeout_s": 15,
    "engine.args": json.dumps({"kv_cache_memory_bytes": 64 * 2**20}),
    "rollout.n": 8,
    "rollout.max_response_tokens": 48,
    "rollout.prompts_per_batch": 16,
    "train.micro_batch_tokens": 4096,
    "train.prompts_per_round": 12,
    "train.rounds": ROUNDS,
    "run.rollouts_per_round": 1000,
}


def server(run: Launched, replica: int) -> psutil.Process:
    """The API server of a replica: its guard's first child."""
    (guard,) = [p for p in run.alive() if any(f"replica-{replica}/" in word for word in guard_command(p))]
    return guard.children()[0]


def guard_command(process: psutil.Process) -> list[str]:
    try:
        words = process.cmdline()
    except psutil.Error:
        return []
    return words if "grpo_ds.engine.guard" in words else []


def generates(process: psutil.Process) -> bool:
    """Whether requests run in the server at this moment."""
    words = process.cmdline()
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/metrics"
    key = {"Authorization": f"Bearer {process.environ()[KEY_VARIABLE]}"}
    answer = httpx.get(url, headers=key, timeout=30, trust_env=False)
    assert answer.status_code == 200, answer.text
    (running,) = re.findall(r"^vllm:num_requests_running\S* (\S+)$", answer.text, re.M)
    return float(running) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_a_killed_and_a_stopped_server(tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    arguments = ["--recipe", str(recipe), *(str(w) for key, value in OPTIONS.items() for w in (f"--{key}", value))]
    with Launched(arguments, tmp_path) as run:
        run.wait_for("the first round", lambda: run.rounds() >= 1)
        first, second = server(run, 0), server(run, 1)
        run.wait_for("replica 0 to generate", lambda: generates(first))
        first.kill()
        run.wait_for("two rounds more", lambda: run.rounds() >= 3)
        run.wait_for("replica 1 to generate", lambda: generates(second))
        second.suspend()
        stopped = time.monotonic()
        run.wait_for("the notice of the stopped server", lambda: "engine replica 1 failed" in run.screen)
        assert time.monotonic() - stopped < 60, "15 s of silence are enough"
        run.wait_for_exit()
        assert run.ends() == 0, run.screen
    assert not first.is_running()
    assert not second.is_running()
    metrics = read_jsonl(run.folder / "metrics.jsonl")
    assert [row["round"] for row in metrics] == list(range(ROUNDS))
    assert sum(row["engine/quarantined"] for row in metrics) == 2
    assert sum(row["engine/restarts"] for row in metrics) >= 1
    assert sum(row["engine/redone_requests"] for row in metrics) >= 1
    # The restarted server holds the policy's weights: its log-probabilities are the trainer's.
    assert max(row["logprob_gap"] for row in metrics) < 1e-3
    rows = [row for path in sorted((run.folder / "rollouts").glob("*.jsonl")) for row in read_jsonl(path)]
    assert all(row["versions"] == [[row["round"], 0, row["tokens"]]] for row in rows)
    samples: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        samples[row["prompt_index"]].append(row["sample"])
    assert len(samples) >= ROUNDS * 12
    assert all(members == list(range(8)) for members in samples.values()), "none is lost and none is there twice"
