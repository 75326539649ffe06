"""The parts of the SGLang engine that need no server: command line, bodies, answers, loader, sampling."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineError, EngineSettings, Request, SamplingSpec, stream_seed
from grpo_ds.engine.sampling import draw, restrict_, uniforms
from grpo_ds.engine.sglang_wire import generate_bodies, parse_response, server_args, update_body
from grpo_ds.sync.receive_sglang import Receiver, load
from grpo_ds.types import VersionSpan
from tests.engine.bench import new_engine
from tests.engine.test_wire import value_of

REQUEST = Request((5, 6), 3, "p3")
SPEC = SamplingSpec(n=2, max_tokens=4)


def arguments(user: dict[str, Any], device: str = "cpu", **config: Any) -> list[str]:
    settings = EngineSettings("m", "float32", 64, Path("logs"), device, 0)
    return server_args(EngineConfig(args=user, **config), settings)


def output(**changes: Any) -> dict[str, Any]:
    meta = {
        "output_token_logprobs": [[-0.5, 7, None], [-1.0, 8, None], [-2.0, 9, None]],
        "finish_reason": {"type": "length", "length": 3},
        "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
    }
    return {"output_ids": [7, 8, 9], "meta_info": meta | changes}


def test_engine_args_override_our_choices_under_sglangs_names() -> None:
    words = arguments({"max-total-tokens": 512, "chunked_prefill_size": 64, "sleep_on_idle": False, "device": None})
    assert (value_of(words, "--max-total-tokens"), value_of(words, "--chunked-prefill-size")) == ("512", "64")
    assert "--sleep-on-idle" not in words and "--device" not in words


@pytest.mark.parametrize("name", ["custom-weight-loader", "sampling_backend", "context_length", "api_key"])
def test_options_that_we_depend_on_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"engine.args.[\w-]+ is set by grpo_ds.* remove it"):
        arguments({name: "x"})


def test_what_only_a_cpu_needs_is_not_told_to_an_accelerator() -> None:
    cpu, cuda = arguments({}), arguments({}, "cuda")
    only_cpu = ("--attention-backend", "--max-total-tokens", "--disable-cuda-graph", "--disable-overlap-schedule")
    assert all(flag in cpu and flag not in cuda for flag in only_cpu)
    assert value_of(cuda, "--device") == "cuda"
    assert "--enable-memory-saver" in arguments({}, "cuda", sleep=True)
    assert "--enable-memory-saver" not in [*cuda, *arguments({}, sleep=True)]


def test_each_response_has_its_own_seed_and_all_share_one_prefix() -> None:
    prefix, responses = generate_bodies(REQUEST, SPEC, 64)
    assert (prefix["input_ids"], prefix["sampling_params"]) == ([5, 6], {"max_new_tokens": 0})
    assert responses["input_ids"] == [[5, 6], [5, 6]]
    assert [p["sampling_seed"] for p in responses["sampling_params"]] == [stream_seed(3), stream_seed(3) + 1]
    assert len(generate_bodies(REQUEST, SamplingSpec(n=1, max_tokens=4), 64)) == 1


def test_a_response_is_asked_for_only_as_long_as_the_context_allows() -> None:
    (body,) = generate_bodies(REQUEST, SamplingSpec(n=1, max_tokens=50), 10)
    assert body["sampling_params"][0]["max_new_tokens"] == 8
    with pytest.raises(EngineError, match="p3 has 2 prompt tokens, .* max_model_len 2"):
        generate_bodies(REQUEST, SPEC, 2)


def test_answers_keep_their_order_and_version_spans() -> None:
    second = output(finish_reason={"type": "stop", "matched": 9})
    one, two = parse_response([output(), second], REQUEST, SPEC)
    assert (one.token_ids, one.logprobs, one.finish_reason) == ((7, 8, 9), (-0.5, -1.0, -2.0), "length")
    assert one.spans == (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3))
    assert two.finish_reason == "stop"


@pytest.mark.parametrize(
    "changes",
    [
        {"output_token_logprobs": [[-0.5, 7, None]]},
        {"output_token_logprobs": [[-0.5, 7, None], [-1.0, 6, None], [-2.0, 9, None]]},
        {"weight_versions": None},
        {"weight_versions": [{"version": "3", "start": 0, "end": 2}]},
        {"finish_reason": None},
        {"finish_reason": {"type": "error"}},
        {"output_token_logprobs": [], "weight_versions": []},
    ],
)
def test_an_answer_that_is_not_whole_is_refused_by_request(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="response 1 of request p3"):
        parse_response([output(), output(**changes)], REQUEST, SPEC)


def test_only_an_aborted_response_may_be_empty() -> None:
    """As SGLang answers for a request that it had not begun."""
    empty = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}}
    first, second = parse_response([empty, output(finish_reason={"type": "abort"})], REQUEST, SPEC)
    assert (first.token_ids, first.logprobs, first.finish_reason, first.spans) == ((), (), "abort", ())
    assert (second.token_ids, second.finish_reason) == ((7, 8, 9), "abort")


def test_a_missing_response_is_refused() -> None:
    with pytest.raises(EngineError, match="p3 asked for 2 responses and got 1"):
        parse_response([output()], REQUEST, SPEC)


def test_a_missing_environment_is_answered_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with pytest.raises(RecipeError, match=r"\.venv-sglang does not exist: run `bash launch/setup.sh --engine sglang`"):
        new_engine("sglang", "m", tmp_path)


# ---- the loader ----


class Toy(nn.Module):
    """Like SGLang's models: one fused parameter of two tensors, and names it does not know are passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.ones(4))
        self.norm = nn.Parameter(torch.ones(2))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        places = {"a": self.fused.data[:2], "b": self.fused.data[2:], "norm": self.norm.data}
        for name, tensor in weights:
            if name in places:
                places[name].copy_(tensor)


def bucket(path: Path, names: list[str]) -> dict[str, Any]:
    path.write_bytes(torch.arange(2.0).repeat(len(names)).numpy().tobytes())
    tensors = [{"name": n, "offset": 8 * i, "dtype": "float32", "shape": [2]} for i, n in enumerate(names)]
    return {"step": "bucket", "bucket": {"path": str(path), "nbytes": 8 * len(names), "tensors": tensors}}


def test_buckets_reach_the_model(tmp_path: Path) -> None:
    model, receiver = Toy(), Receiver()
    receiver.take(model, {"step": "begin", "names": ["a", "b", "norm"]})
    receiver.take(model, bucket(tmp_path / "1", ["a", "norm"]))
    with pytest.raises(ValueError, match="1 tensors .* among them b"):
        receiver.take(model, {"step": "finish"})
    receiver.take(model, bucket(tmp_path / "2", ["b"]))
    receiver.take(model, {"step": "finish"})
    assert (model.fused.tolist(), model.norm.tolist()) == ([0.0, 1.0, 0.0, 1.0], [0.0, 1.0])


@pytest.mark.parametrize(("sent", "missed"), [(["a", "norm"], "fused"), (["a", "b", "normm"], "norm")])
def test_a_parameter_that_nothing_reached_is_an_error(tmp_path: Path, sent: list[str], missed: str) -> None:
    model, receiver = Toy(), Receiver()
    receiver.take(model, {"step": "begin", "names": sent})
    receiver.take(model, bucket(tmp_path / "1", sent))
    with pytest.raises(ValueError, match=f"1 parameters .* not reached .* among them {missed}$"):
        receiver.take(model, {"step": "finish"})


def test_a_bucket_before_its_begin_and_an_unannounced_tensor_are_refused(tmp_path: Path) -> None:
    receiver = Receiver()
    with pytest.raises(ValueError, match="before its begin"):
        receiver.take(Toy(), bucket(tmp_path / "1", ["a"]))
    receiver.take(Toy(), {"step": "begin", "names": ["a"]})
    with pytest.raises(ValueError, match="tensor b is not in the list"):
        receiver.take(Toy(), bucket(tmp_path / "1", ["a", "b"]))


def test_a_message_arrives_as_it_was_sent_to_every_rank() -> None:
    body = update_body({"step": "bucket", "bucket": {"tensors": []}}, 2, version=7)
    assert body["weight_version"] == "7" and body["flush_cache"] is False
    first, second = (pickle.loads(base64.b64decode(text)) for text in body["serialized_named_tensors"])
    assert first[0][0] == second[0][0] == "message"
    assert json.loads(bytes(first[0][1].tolist())) == {"step": "bucket", "bucket": {"tensors": []}}
    with pytest.raises(ValueError, match="before its begin"):
        load(Toy(), first)


# ---- sampling ----


def test_the_random_numbers_are_those_of_splitmix64() -> None:
    """Its published first outputs from state 0; the hash of seed 0 is 0."""
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = uniforms(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert got.tolist() == [(value >> 11) / 2**53 for value in wanted]


def test_numbers_of_neighbouring_seeds_and_positions_are_spread_evenly() -> None:
    seeds, positions = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    numbers = uniforms(seeds.flatten(), positions.flatten())
    counts = torch.histc(numbers, 10, 0, 1)
    assert (counts - 1000).abs().max() < 150, "five standard deviations of 10000 draws into ten bins"
    grid = numbers.view(100, 100) - 0.5
    assert (grid[1:] * grid[:-1]).mean().abs() < 0.005 and (grid[:, 1:] * grid[:, :-1]).mean().abs() < 0.005


def test_a_number_chooses_the_token_whose_share_it_falls_into() -> None:
    """Shares .5 0 .25 .25: the borders are at .5 and .75; a token of probability 0 is never chosen."""
    probs = torch.tensor([0.5, 0.0, 0.25, 0.25]).expand(6, 4)
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs, numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_top_k_comes_before_top_p_and_each_row_has_its_own() -> None:
    """.5 .3 .2: top_p .6 keeps 5/8 3/8; top_k 2 makes 5/8 3/8, of which top_p .6 keeps the first; off keeps all."""
    probs = torch.tensor([0.3, 0.5, 0.2]).repeat(3, 1)
    restrict_(probs, torch.tensor([3, 2, 1 << 30]), torch.tensor([0.6, 0.6, 1.0]))
    wanted = torch.tensor([[3 / 8, 5 / 8, 0.0], [0.0, 1.0, 0.0], [0.3, 0.5, 0.2]])
    torch.testing.assert_close(probs, wanted)


def test_code_of_the_model_folder_runs_in_the_server_only_where_the_recipe_says_so() -> None:
    settings = EngineSettings("m", "float32", 64, Path("logs"), "cpu", 0)
    assert not any("trust" in word for word in server_args(EngineConfig(kind="sglang"), settings))
    assert "--trust-remote-code" in server_args(EngineConfig(kind="sglang"), replace(settings, trust_remote_code=True))
