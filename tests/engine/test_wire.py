"""The parts of the engines that need no server: command line, answers, distributions, environment, bucket files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine import sglang_wire
from grpo_ds.engine.base import EngineError, EngineSettings, Request, SamplingSpec, stream_seed
from grpo_ds.engine.hf import processed_logprobs
from grpo_ds.engine.vllm_wire import generate_body, parse_response, server_args
from grpo_ds.sync.receive import BucketReader, NameLedger, checksum
from grpo_ds.types import VersionSpan
from tests.engine.bench import new_engine

REQUEST = Request((5, 6), 3, "p3")
SPEC = SamplingSpec(n=2, max_tokens=4)


def arguments(user: dict[str, Any], device: str = "cpu", **config: Any) -> list[str]:
    settings = EngineSettings("m", "float32", 64, Path("logs"), device, 0)
    return server_args(EngineConfig(args=user, **config), settings)


def value_of(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def choice(index: int, **changes: Any) -> dict[str, Any]:
    made = {
        "index": index,
        "token_ids": [7, 8, 9],
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.0}, {"logprob": -2.0}]},
        "finish_reason": "length",
        "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
    }
    return made | changes


def test_engine_args_override_our_choices_under_vllms_names() -> None:
    words = arguments({"block_size": 64, "max-num-seqs": 8, "enforce_eager": False, "dtype": "bfloat16"})
    assert [value_of(words, f"--{name}") for name in ("block-size", "max-num-seqs", "dtype")] == ["64", "8", "bfloat16"]
    assert "--no-enforce-eager" in words and "--enforce-eager" not in words


def test_null_removes_one_of_our_choices_and_a_table_becomes_json() -> None:
    words = arguments({"block_size": None, "hf_overrides": {"a": 1}})
    assert "--block-size" not in words
    assert value_of(words, "--hf-overrides") == '{"a": 1}'


def test_options_that_updates_depend_on_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"engine.args.logprobs-mode .* remove it"):
        arguments({"logprobs-mode": "raw_logprobs"})


WIRES: dict[str, Callable[[EngineConfig, EngineSettings], list[str]]] = {
    "vllm": server_args,
    "sglang": sglang_wire.server_args,
}


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *(("vllm", name) for name in ("logits_proc", "logits-processor", "override_gen", "hos", "mod", "watermark")),
        *(("vllm", name) for name in ("speculative_config", "spec_method", "speculative-config", "watermark_config")),
        *(("vllm", name) for name in ("no-enable-scale-out", "enable-scale", "no_watermark")),
        *(
            ("sglang", name)
            for name in ("preferred_sampling", "model", "enable_det", "speculative-algorithm", "dllm-fdfo")
        ),
        *((kind, name) for kind in ("vllm", "sglang") for name in ("config", "conf")),
    ],
)
def test_an_option_that_is_set_by_us_is_refused_under_every_name_that_argparse_takes(kind: str, option: str) -> None:
    settings = EngineSettings("m", "float32", 64, Path("logs"), "cpu", 0)
    with pytest.raises(
        RecipeError, match=rf"engine.args.{option} is (set by grpo_ds|the beginning of \w+, which is set)"
    ):
        WIRES[kind](EngineConfig(args={option: "x"}), settings)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "key", ["override_generation_config.min_p", "--seed", "-O", "seed=1", "a b", "", "compilation-config.level"]
)
def test_what_is_no_plain_option_is_refused(kind: str, key: str) -> None:
    settings = EngineSettings("m", "float32", 64, Path("logs"), "cpu", 0)
    with pytest.raises(RecipeError, match=rf"engine.args contains '{key}': give an option's name without dots"):
        WIRES[kind](EngineConfig(args={key: 1}), settings)


@pytest.mark.parametrize("value", ["--model", ["a", "--logits-processors=x"]])
def test_a_value_that_would_be_taken_for_an_option_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"engine.args.lora_modules has a value that begins with --"):
        arguments({"lora_modules": value})


def test_options_that_only_resemble_ours_are_handed_on() -> None:
    words = arguments({"specialize_active_lora": True, "max_logprobs": 5, "tokenizer": "t"})
    assert "--specialize-active-lora" in words and value_of(words, "--tokenizer") == "t"


def test_every_request_says_that_min_p_and_penalties_are_off() -> None:
    sampling = generate_body(REQUEST, SPEC)["sampling_params"]
    names = ("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    assert [sampling[name] for name in names] == [0.0, 0.0, 0.0, 1.0]


def test_the_server_can_sleep_only_where_there_is_memory_to_give_back() -> None:
    assert "--enable-sleep-mode" in arguments({}, "cuda", sleep=True)
    assert "--no-enable-sleep-mode" in arguments({}, "cuda")
    assert not any("sleep" in word for word in arguments({}, sleep=True))


def test_one_process_runs_the_model_only_where_one_is_asked_for_on_cpu() -> None:
    assert value_of(arguments({}), "--distributed-executor-backend") == "uni"
    assert "--distributed-executor-backend" not in arguments({"tensor_parallel_size": 2})
    assert "--distributed-executor-backend" not in arguments({}, "cuda")


def test_answers_are_put_in_order_and_keep_their_version_spans() -> None:
    swapped = {"choices": [choice(1, token_ids=[1, 2, 3]), choice(0)]}
    first, second = parse_response(swapped, REQUEST, SPEC)
    assert (first.token_ids, second.token_ids) == ((7, 8, 9), (1, 2, 3))
    assert first.logprobs == (-0.5, -1.0, -2.0)
    assert first.spans == (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [7, 8]},
        {"weight_versions": None},
        {"weight_versions": [{"version": "3", "start": 0, "end": 2}]},
        {"finish_reason": "error"},
        {"token_ids": [], "logprobs": {"content": []}, "weight_versions": []},
    ],
)
def test_an_answer_that_is_not_whole_is_refused_by_request(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="response 1 of request p3"):
        parse_response({"choices": [choice(0), choice(1, **changes)]}, REQUEST, SPEC)


def test_only_an_aborted_response_may_be_empty() -> None:
    empty: dict[str, Any] = {"token_ids": [], "logprobs": None, "weight_versions": None, "finish_reason": "abort"}
    first, second = parse_response({"choices": [choice(0, **empty), choice(1, finish_reason="abort")]}, REQUEST, SPEC)
    assert (first.token_ids, first.logprobs, first.finish_reason, first.spans) == ((), (), "abort", ())
    assert (second.token_ids, second.finish_reason) == ((7, 8, 9), "abort")


def test_a_missing_response_is_refused() -> None:
    with pytest.raises(EngineError, match="p3 asked for 2 responses and got 1"):
        parse_response({"choices": [choice(0)]}, REQUEST, SPEC)


def test_the_body_carries_the_hashed_seed() -> None:
    assert generate_body(REQUEST, SPEC)["sampling_params"]["seed"] == stream_seed(3)
    assert len({stream_seed(seed) for seed in range(1000)}) == 1000
    assert all(0 <= stream_seed(seed) < 2**56 for seed in range(1000))


def test_weights_of_a_joined_server_have_no_known_version() -> None:
    (rollout,) = parse_response(
        {"choices": [choice(0, weight_versions=[{"version": "default", "start": 0, "end": 3}])]},
        REQUEST,
        SamplingSpec(n=1, max_tokens=4),
    )
    assert rollout.spans == (VersionSpan(-1, 0, 3),)


@pytest.mark.parametrize(
    "changes", [{"n": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"n": 2, "temperature": 0.0}]
)
def test_impossible_sampling_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SamplingSpec(**({"n": 1, "max_tokens": 1} | changes))


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    """Probabilities .5 .3 .2: top_p .6 keeps the first two, which become 5/8 and 3/8; .5 keeps the first alone."""
    logits = torch.tensor([[0.3, 0.5, 0.2]]).log()
    kept = processed_logprobs(logits, SamplingSpec(n=1, max_tokens=1, top_p=0.6)).exp()[0]
    torch.testing.assert_close(kept, torch.tensor([3 / 8, 5 / 8, 0.0]))
    alone = processed_logprobs(logits, SamplingSpec(n=1, max_tokens=1, top_p=0.5)).exp()[0]
    torch.testing.assert_close(alone, torch.tensor([0.0, 1.0, 0.0]))


def test_temperature_and_top_k_come_before_the_softmax() -> None:
    """Odds 4 : 2 : 1 at temperature 1/2 are 16 : 4 : 1; top_k 2 leaves 4/5 and 1/5."""
    logits = torch.tensor([[math.log(4), math.log(2), 0.0]])
    got = processed_logprobs(logits, SamplingSpec(n=1, max_tokens=1, temperature=0.5, top_k=2)).exp()[0]
    torch.testing.assert_close(got, torch.tensor([0.8, 0.2, 0.0]))


def fake_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_port_lost_to_another_process_is_replaced_twice(tmp_path: Path) -> None:
    python = fake_python(
        tmp_path / "python", 'echo "$@" >> ' + f"{tmp_path}/calls; echo Address already in use; exit 1"
    )
    engine = new_engine("vllm", "m", tmp_path, python=python)
    engine.start()
    with pytest.raises(EngineError, match=r"(?s)exit code 1 .*Address already in use"):
        engine.wait_ready()
    calls = [call.split() for call in (tmp_path / "calls").read_text().splitlines()]
    assert len({value_of(call, "--port") for call in calls}) == len(calls) == 3
    assert all(value_of(call, "--host") == "127.0.0.1" for call in calls)


def test_the_server_does_not_see_the_trainers_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    engine = new_engine("vllm", "m", tmp_path, python=fake_python(tmp_path / "python", f"env > {tmp_path}/env; exit 1"))
    engine.start()
    with pytest.raises(EngineError, match="exit code 1"):
        engine.wait_ready()
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(seen)
    assert seen["OMP_NUM_THREADS"] == "3"


def test_the_servers_key_is_in_its_environment_and_nowhere_else(tmp_path: Path) -> None:
    script = f'echo "$@" > {tmp_path}/args; env > {tmp_path}/env; exit 1'
    engine = new_engine("vllm", "m", tmp_path, python=fake_python(tmp_path / "python", script))
    engine.start()
    with pytest.raises(EngineError, match="the vLLM server ended with exit code 1"):
        engine.wait_ready()
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    key = seen["GRPO_DS_ENGINE_KEY"]
    assert len(key) == 32 and key not in (tmp_path / "args").read_text()
    assert (tmp_path / "vllm_server.log").stat().st_mode & 0o077 == 0
    assert not Path(seen["TMPDIR"]).exists(), "the server's temporary files end with it"


def test_a_python_that_does_not_exist_is_named(tmp_path: Path) -> None:
    engine = new_engine("vllm", "m", tmp_path, python="/no/such/python")
    engine.start()
    with pytest.raises(EngineError, match="cannot run /no/such/python: No such file"):
        engine.wait_ready()


def bucket(path: Path, **entry: Any) -> dict[str, Any]:
    data = torch.arange(8, dtype=torch.float32).numpy().tobytes()
    path.write_bytes(data)
    made = {"name": "w", "offset": 8, "dtype": "float32", "shape": [2, 3]} | entry
    return {"path": str(path), "nbytes": 32, "tensors": [made], "sums": {"w": checksum(data[8:])}}


def test_a_bucket_is_viewed_at_its_offset(tmp_path: Path) -> None:
    ((name, tensor),) = BucketReader().tensors(bucket(tmp_path / "b"))
    assert (name, tensor.tolist()) == ("w", [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])


def test_a_file_that_was_replaced_is_mapped_anew(tmp_path: Path) -> None:
    reader, manifest = BucketReader(), bucket(tmp_path / "b")
    list(reader.tensors(manifest))
    (tmp_path / "new").write_bytes(bytes(32))
    os.replace(tmp_path / "new", tmp_path / "b")
    ((_, tensor),) = reader.tensors(manifest | {"sums": {}})
    assert tensor.tolist() == [[0.0] * 3] * 2


def test_memory_of_a_trainer_that_has_ended_is_let_go_with_the_first_bucket_of_the_next(tmp_path: Path) -> None:
    reader = BucketReader()
    list(reader.tensors(bucket(tmp_path / "old")))
    (tmp_path / "old").unlink()
    assert f"{tmp_path}/old (deleted)" in Path("/proc/self/maps").read_text()
    list(reader.tensors(bucket(tmp_path / "next")))
    assert f"{tmp_path}/old" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"shape": [7]}, "do not fit"),
        ({"offset": -8}, "do not fit"),
        ({"offset": 6}, "do not fit"),
        ({"dtype": "int64"}, "dtype 'int64'"),
        ({"offset": 4}, "checksum"),
    ],
)
def test_a_tensor_that_is_not_in_the_bucket_is_refused(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        list(BucketReader().tensors(bucket(tmp_path / "b", **entry)))


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 32 bytes, its manifest says 64"):
        list(BucketReader().tensors(bucket(tmp_path / "b") | {"nbytes": 64}))


def test_the_ledger_names_what_is_missing() -> None:
    ledger = NameLedger(["a", "b"])
    ledger.arrived(["a"])
    with pytest.raises(ValueError, match="1 tensors .* among them b"):
        ledger.require_complete()
    with pytest.raises(ValueError, match="tensor c is not in the list"):
        ledger.check(["c"])


def test_code_of_the_model_folder_runs_in_the_server_only_where_the_recipe_says_so() -> None:
    settings = EngineSettings("m", "float32", 64, Path("logs"), "cpu", 0)
    assert not any("trust" in word for word in server_args(EngineConfig(), settings))
    assert "--trust-remote-code" in server_args(EngineConfig(), replace(settings, trust_remote_code=True))
