"""What goes over the wire to SGLang and what comes back: command line, request bodies, answers. Pure."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import torch

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import EngineError, EngineSettings, RawRollout, Request, SamplingSpec, stream_seed
from grpo_ds.engine.wire import command_line, user_options, whole_rollout

LOADER = "grpo_ds.sync.receive_sglang.load"
_SPARE_TOKENS = 8
"""SGLang keeps the last few positions of its context length to itself."""
NEEDED: dict[str, Any] = {
    "custom_weight_loader": [LOADER],
    "weight_version": "0",
    "sampling_backend": "pytorch",
    "skip_server_warmup": True,  # it sends a prompt that does not fit a short context
    "tokenizer_worker_num": 1,  # each would be a web server that does not ask for the key
}
"""Options that `grpo_ds.engine.sglang_serve` gives to every server: updates, seeds and log-probabilities need them."""
_RESERVED = (
    "model_path",
    "served_model_name",
    "host",
    "api_key",
    "admin_api_key",
    "context_length",
    "enable_deterministic_inference",
    "rl_on_policy_target",
    *("preferred_sampling_params", "watermark*", "enable_watermark", "enable_strict_thinking", "forward_hooks"),
    *("speculative*", "decoupled_spec*", "dllm*"),  # other ways to draw tokens than the seeded sampler
    *NEEDED,
)

_OFF = {"min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
"""Said in each request: a server of engine.urls may have been started with other preferred_sampling_params."""


def server_args(config: EngineConfig, settings: EngineSettings) -> list[str]:
    """SGLang's command line without host, port and `NEEDED`.

    engine.args overrides our choices under SGLang's own names; null and false remove one. Raises RecipeError for
    options that may not be changed.
    """
    args: dict[str, Any] = {
        "model_path": settings.model_path,
        "dtype": settings.dtype,
        "device": settings.device,
        "context_length": settings.max_model_len + _SPARE_TOKENS,
        "random_seed": settings.seed,
        "sleep_on_idle": True,
        "log_level_http": "warning",
    }
    if settings.trust_remote_code:
        args["trust_remote_code"] = True
    if settings.device == "cpu":
        args |= {
            "attention_backend": "torch_native",
            "max_total_tokens": 65536,
            "mem_fraction_static": 0.1,
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
        }
    else:
        args["mem_fraction_static"] = 0.4  # the trainer's rank lives on the same GPU
        args["enable_memory_saver"] = config.sleep  # without it the CPU engine answers the routes, and frees nothing
    return command_line(args, user_options(config.args, _RESERVED), flag)


def flag(name: str, on: bool) -> list[str]:
    """The words for an SGLang option that is true or false."""
    return [name] if on else []


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
        **_OFF,
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


def _rollout(output: dict[str, Any], k: int, request_id: str) -> RawRollout:
    meta = output["meta_info"]
    sampled = meta.get("output_token_logprobs") or ()
    what = f"response {k} of request {request_id}"
    if [entry[1] for entry in sampled] != list(output["output_ids"]):
        raise EngineError(f"{what} is not whole: the log-probabilities are of other tokens than its own")
    return whole_rollout(
        what,
        output["output_ids"],
        [entry[0] for entry in sampled],
        meta.get("weight_versions"),
        (meta["finish_reason"] or {}).get("type"),
    )
