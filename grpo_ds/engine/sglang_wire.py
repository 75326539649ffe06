"""What goes over the wire to SGLang and what comes back: command line, request bodies, answers. Pure."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import torch

from grpo_ds.config import RecipeError
from grpo_ds.engine.base import EngineError, RawRollout, Request, SamplingSpec, parse_version, stream_seed
from grpo_ds.types import FinishReason, VersionSpan

LOADER = "grpo_ds.sync.receive_sglang.load"
_SPARE_TOKENS = 8
"""SGLang keeps the last few positions of its context length to itself."""
_RESERVED = (
    "model_path",
    "served_model_name",
    "host",
    "api_key",
    "admin_api_key",
    "context_length",
    "custom_weight_loader",
    "weight_version",
    "sampling_backend",
    "enable_deterministic_inference",
    "rl_on_policy_target",
)
"""Options that weight updates, seeds and log-probabilities depend on."""


def server_args(
    user: dict[str, Any], model_path: str, dtype: str, max_model_len: int, device: str, seed: int
) -> list[str]:
    """SGLang's command line without host and port.

    `user` (engine.args) overrides our choices under SGLang's own names; null and false remove one. Raises RecipeError
    for options that may not be changed.
    """
    user = {key.replace("-", "_"): value for key, value in user.items()}
    for key in _RESERVED:
        if key in user:
            raise RecipeError(f"engine.args.{key} is set by grpo_ds, which depends on its value: remove it")
    args: dict[str, Any] = {
        "model_path": model_path,
        "dtype": dtype,
        "device": device,
        "context_length": max_model_len + _SPARE_TOKENS,
        "random_seed": seed,
        "weight_version": "0",
        "custom_weight_loader": [LOADER],
        "sampling_backend": "pytorch",
        "sleep_on_idle": True,
        "skip_server_warmup": True,  # it sends a prompt that does not fit a short context
        "log_level_http": "warning",
    }
    if device == "cpu":
        args |= {
            "attention_backend": "torch_native",
            "max_total_tokens": 65536,
            "mem_fraction_static": 0.1,
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
        }
    else:
        args["mem_fraction_static"] = 0.4  # the trainer's rank lives on the same GPU
    merged = args | {key: value for key, value in user.items() if key != "port"}
    return [word for key, value in merged.items() for word in _flag(key, value)]


def _flag(key: str, value: Any) -> list[str]:
    name = "--" + key.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [name]
    if isinstance(value, list):
        return [name, *map(str, value)]
    return [name, json.dumps(value) if isinstance(value, dict) else str(value)]


def generate_bodies(request: Request, spec: SamplingSpec, max_model_len: int) -> list[dict[str, Any]]:
    """JSON bodies of POST /generate; raises EngineError for a prompt that leaves no room for a response.

    The n responses are n entries, because SGLang's own n would give all of them one seed. As SGLang does for its n, the
    prompt alone is sent before them: requests that arrive together would each compute its keys and values.
    """
    prompt = list(request.prompt_token_ids)
    limit = min(spec.max_tokens, max_model_len - len(prompt))
    if limit < 1:
        raise EngineError(
            f"request {request.request_id} has {len(prompt)} prompt tokens, which leaves no room for a response in "
            f"max_model_len {max_model_len}"
        )
    # SGLang takes top_k 1 for temperature 0, whose log-probabilities are not 0 here; a top_p close to 0 says the same.
    one = spec.top_k == 1 and spec.temperature > 0
    shared = {
        "max_new_tokens": limit,
        "temperature": spec.temperature,
        "top_p": 1e-6 if one else spec.top_p,
        "top_k": -1 if one else spec.top_k or -1,
        "stop_token_ids": list(spec.stop_token_ids),
    }
    seed = stream_seed(request.seed)
    responses = {
        "input_ids": [prompt] * spec.n,
        "sampling_params": [shared | {"sampling_seed": seed + k} for k in range(spec.n)],
        "return_logprob": True,
    }
    prefix = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0}}
    return [prefix, responses] if spec.n > 1 else [responses]


def update_body(message: dict[str, Any], ranks: int, version: int | None = None) -> dict[str, Any]:
    """JSON body of POST /update_weights_from_tensor: a message of `grpo_ds.sync.receive_sglang` for each rank.

    SGLang takes pickled tensors and unpickles them with a list of allowed types. This is a uint8 tensor of a few
    kilobytes; the weights themselves never are in it.
    """
    packed = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    pickled = base64.b64encode(pickle.dumps([("message", packed)])).decode()
    return {
        "serialized_named_tensors": [pickled] * ranks,
        "load_format": LOADER,
        "flush_cache": False,
        "weight_version": None if version is None else str(version),
    }


def parse_response(answer: Any, request: Request, spec: SamplingSpec) -> list[RawRollout]:
    """The spec.n rollouts of one answer. Raises EngineError when the answer is not what was asked for."""
    outputs = answer if isinstance(answer, list) else [answer]
    if len(outputs) != spec.n:
        raise EngineError(f"request {request.request_id} asked for {spec.n} responses and got {len(outputs)}")
    return [_rollout(output, k, request.request_id) for k, output in enumerate(outputs)]


_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def _rollout(output: dict[str, Any], k: int, request_id: str) -> RawRollout:
    meta = output["meta_info"]
    tokens = tuple(output["output_ids"])
    sampled = meta["output_token_logprobs"]
    reason = (meta["finish_reason"] or {}).get("type")
    spans = tuple(
        VersionSpan(parse_version(span["version"]), span["start"], span["end"])
        for span in meta.get("weight_versions") or ()
    )
    covered = [position for span in spans for position in range(span.start, span.end)]
    same = [entry[1] for entry in sampled] == list(tokens)
    if not same or covered != list(range(len(tokens))) or reason not in _REASONS:
        raise EngineError(
            f"response {k} of request {request_id} is not whole: {len(tokens)} tokens, {len(sampled)} "
            f"log-probabilities, version spans {spans}, finish reason {meta['finish_reason']!r}"
        )
    return RawRollout(tokens, tuple(float(entry[0]) for entry in sampled), _REASONS[reason], spans)
