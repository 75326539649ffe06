"""The parity gate over two real ZeRO-3 ranks: each planted fault stops the run with its own name, a sound run passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, Qwen3Config

from tests.e2e.harness import read_jsonl, run
from tests.models import random_model
from tests.sync.test_trained_policy_reaches_the_engine import free_port

ROOT = Path(__file__).resolve().parents[2]
Report = dict[str, dict[str, Any]]

RECIPE = """
model: {path: model}
data: {train: train.jsonl, max_prompt_tokens: 8}
reward: {functions: ["rewards.py:mixed"], workers: 1, dry_run_rows: 1}
rollout: {n: 4, max_response_tokens: 16, temperature: 0.8}
engine: {start_timeout_s: 600}
algorithm: {filter_groups: {enable: false}}
actor: {lr: 1.0e-2, kl_loss_coef: 0.01}
train: {prompts_per_round: 8, micro_batch_tokens: 96}
"""
REWARDS = """
def mixed(completions, **columns):
    return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in completions]
"""


def write_project(folder: Path) -> Path:
    """An untied random model whose folder recommends odd sampling settings, prompts and a recipe; returns the recipe."""
    from grpo_ds.demo import build_tokenizer

    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = random_model(
        Qwen3Config, vocab_size=len(tokenizer), num_hidden_layers=2, head_dim=32, max_position_embeddings=128,
        tie_word_embeddings=False, initializer_range=0.1, **sizes,
    )  # fmt: skip
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=3, top_p=0.5, min_p=0.3, repetition_penalty=1.5, eos_token_id=1
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{k}+{k + 1}="} for k in range(11, 40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    recipe = folder / "parity.yaml"
    recipe.write_text(RECIPE)
    return recipe


def plant(folder: Path, *options: str, faults: str = "") -> Report:
    """What the gate of two ranks said of all faults of `parity_faults.py`, or that of one rank of those named."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [sys.executable, *([] if faults else launcher), str(ROOT / "tests" / "sync" / "parity_faults.py")]
    done = subprocess.run(
        [*command, "--recipe", str(write_project(folder)), "--run.dir", str(folder / "runs"), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PLANT": faults},
        capture_output=True,
        text=True,
        timeout=800,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return dict(json.loads(lines[0].removeprefix("REPORT ")))


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of one rank each, on this machine."""
    folder, port = tmp_path_factory.mktemp("parity_nodes"), str(free_port())
    end = [str(ROOT / "tests" / "sync" / "parity_faults.py"), "--recipe", str(write_project(folder))]
    end += ["--run.dir", str(folder / "runs"), "--engine.kind", "hf"]
    head = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    with ExitStack() as files:
        nodes = [
            subprocess.Popen(
                [sys.executable, *head, "--master-port", port, "--node-rank", str(node), *end],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=files.enter_context(open(folder / f"node-{node}.txt", "w")),
                stderr=subprocess.STDOUT,
            )
            for node in range(2)
        ]
        try:
            for node in nodes:
                node.wait(240)
        finally:
            for node in nodes:
                node.kill()
    screens = [(folder / f"node-{node}.txt").read_text() for node in range(2)]
    lines = [line for screen in screens for line in screen.splitlines() if "REPORT " in line]
    assert len(lines) == 1, "\n".join(screens)
    return dict(json.loads(lines[0].partition("REPORT ")[2]))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return plant(tmp_path_factory.mktemp("parity_hf"), "--engine.kind", "hf")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Seconds, where all faults take minutes."""
    faults = "healthy,temperature,stale_within_the_limits"
    return plant(tmp_path_factory.mktemp("parity_few"), "--engine.kind", "hf", faults=faults)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return plant(tmp_path_factory.mktemp("parity_vllm"), "--engine.kind", "vllm")


SAYS = {
    "temperature": "sampling temperature: the engine's log-probabilities are those of temperature 0.5, and",
    "raw": "temperature 1, which is also that of log-probabilities taken before the temperature, and rollout.temp",
    "top_k": "top-k: the engine samples with temperature 0.8, top_k 5, ",
    "top_p": "top-p: the engine samples with temperature 0.8, top_p 0.8",
    "min_p": "min-p: the engine samples with temperature 0.8, min_p 0.1",
    "generation_config": "generation_config.json: the engine samples with temperature 0.7, top_k 12, top_p 0.9, ",
    "bos": "prompt template: the engine puts the BOS token (2) before the prompts",
    "tied_head": "output head: the engine takes its input embedding for the head (tied)",
    "bfloat16": "dtype: the gap is the rounding of a model that computes in bfloat16",
    "never_published": "stale weights: the engine answers exactly as it did at policy version 0",
    "one_publication_lost": "stale weights: a publication was lost",
    "first_head": "output head: the engine still has the head it started with, and all else is new",
    "stale_within_the_limits": "stale weights: the engine answers exactly as it did at policy version",
    "weights_of_the_start": "stale weights: the engine holds those of the reference",
}


def assert_named(report: Report, fault: str) -> None:
    """On both ranks in the same words: the numbers, the limits, the cause."""
    found = report[fault]
    assert found["same"] and found["error"], found
    assert found["error"].startswith(found["line"] + ". Cause: "), found
    assert SAYS[fault] in found["error"], found["error"]
    print(f"{fault}: {found['error']}")


def assert_sound(report: Report, name: str) -> None:
    found = report[name]
    print(f"{name}: {found['line']}")
    assert found["error"] is None
    assert 0 < found["numbers"]["parity/max"] < 1e-4


def test_a_gate_passes_what_is_sound_and_names_what_is_not(few: Report) -> None:
    assert_sound(few, "healthy")
    assert_named(few, "temperature")


def test_a_node_that_is_wrong_among_others_is_not_diluted_and_its_cause_is_named(two_nodes: Report) -> None:
    assert_sound(two_nodes, "healthy")
    assert "nats on the worst of 2 nodes (allowed: " in two_nodes["healthy"]["line"]
    found = two_nodes["temperature_of_one_node"]
    assert found["same"] and found["error"].startswith(found["line"] + ". Cause: " + SAYS["temperature"]), found
    assert found["numbers"]["parity/mean"] > 0.1


def test_a_node_that_no_publication_reaches_is_named_although_the_other_one_moved(two_nodes: Report) -> None:
    found = two_nodes["one_node_stale"]
    assert found["same"], found
    assert "Cause: stale weights: the engine answers exactly as it did at policy version 0 (node 1)" in found["error"]


def test_an_engine_that_no_step_reaches_is_stopped_however_small_the_gap(few: Report) -> None:
    assert_named(few, "stale_within_the_limits")
    assert "(allowed: sync.parity_max inf, " in few["stale_within_the_limits"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", SAYS)
def test_the_in_process_engine_is_stopped_with_the_cause(hf: Report, fault: str) -> None:
    assert_named(hf, fault)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["healthy", "healthy at the end"])
def test_a_sound_run_passes(hf: Report, name: str) -> None:
    assert_sound(hf, name)


@pytest.mark.slow
def test_what_no_hypothesis_explains_lists_all_that_were_ruled_out(hf: Report) -> None:
    error = hf["rope"]["error"]
    assert "No cause found; ruled out: temperature (leaves p99 " in error and hf["rope"]["same"]
    tried = ["BOS removed", "weights of the last gate", "weights of the reference", "head of the start", "bfloat16"]
    assert all(name in error for name in [*tried, "embedding as head", "float16", "weights published again"])


@pytest.mark.slow
def test_a_gate_in_the_loop_stops_the_run_after_its_numbers_are_written(hf: Report) -> None:
    found = hf["in the loop"]
    assert SAYS["never_published"][:50] in found["error"]
    (metrics,) = [json.loads(line) for line in found["metrics"]]
    assert metrics["round"] == 0 and metrics["parity/max"] > 0.01 and metrics["parity/p99"] > 0.001


@pytest.mark.slow
def test_the_gate_is_passed_at_the_start_and_every_so_many_rounds(tmp_path: Path) -> None:
    options = ["--recipe", str(write_project(tmp_path)), "--engine.kind", "hf", "--train.rounds", "3"]
    done = run([*options, "--sync.parity_every", "2"], tmp_path, "deepspeed")
    assert done.process.returncode == 0, done.screen
    assert done.screen.count("parity at policy version 0: |trainer - engine| log-probability of ") == 1
    rounds = read_jsonl(done.folder / "metrics.jsonl")
    assert ["parity/max" in line for line in rounds] == [False, True, False]
    assert 0 < rounds[1]["parity/p99"] <= rounds[1]["parity/max"] < 1e-4


@pytest.mark.slow
def test_what_is_not_a_number_is_stopped(hf: Report) -> None:
    assert "1 log-probabilities are not finite" in hf["not_a_number"]["error"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "fault", ["raw", "top_k", "top_p", "min_p", "never_published", "one_publication_lost", "stale_within_the_limits"]
)
def test_a_real_server_is_stopped_with_the_cause(vllm: Report, fault: str) -> None:
    assert_named(vllm, fault)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_of_another_dtype_is_stopped_before_a_token_is_paid_for(tmp_path: Path) -> None:
    """As a user would do it: one option of the real server, the real launcher."""
    options = [
        "--recipe",
        str(write_project(tmp_path)),
        "--engine.kind",
        "vllm",
        "--engine.args",
        '{"dtype": "bfloat16"}',
    ]
    done = run(options, tmp_path, "deepspeed")
    print(done.cause())
    assert done.process.returncode == 1, done.screen
    assert done.cause().startswith("ParityError: parity at policy version 0: |trainer - engine|"), done.screen
    assert SAYS["bfloat16"] in done.cause()
    assert done.rounds() == 0 and not list(done.folder.glob("rollouts/*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["healthy", "healthy at the end"])
def test_a_real_server_passes_whatever_its_model_folder_recommends(vllm: Report, name: str) -> None:
    assert_sound(vllm, name)
