"""What goes over the wire to vLLM and what comes back: command line, request body, response. Pure."""

from __future__ import annotations

import json
from typing import Any, get_args

from grpo_ds.config import RecipeError
from grpo_ds.engine.base import EngineError, RawRollout, Request, SamplingSpec, parse_version, stream_seed
from grpo_ds.types import FinishReason, VersionSpan

_RESERVED = (
    "model",
    "served_model_name",
    "host",
    "worker_extension_cls",
    "weight_transfer_config",
    "logprobs_mode",
    "enable_scale_out",
)
"""Options that weight updates and log-probabilities depend on."""
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def server_args(
    user: dict[str, Any], model_path: str, dtype: str, max_model_len: int, device: str, seed: int
) -> list[str]:
    """vLLM's command line without host and port.

    `user` (engine.args) overrides our choices under vLLM's own names; the value null removes one. Raises RecipeError
    for options that may not be changed.
    """
    user = {key.replace("-", "_"): value for key, value in user.items()}
    for key in _RESERVED:
        if key in user:
            raise RecipeError(f"engine.args.{key} is set by grpo_ds, which depends on its value: remove it")
    args: dict[str, Any] = {
        "model": model_path,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "seed": seed,
        "enable_scale_out": True,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "grpo_ds.sync.receive_vllm.WorkerExtension",
        "weight_transfer_config": {"backend": "grpo_ds"},
        "block_size": 32,
        "disable_uvicorn_access_log": True,
    }
    if device == "cpu":
        args["kv_cache_memory_bytes"] = 256 * 2**20
        args["enforce_eager"] = True  # compiling costs more than a short run gains
        # A seeded request whose prompt is cut into chunks kills the CPU engine of this release.
        args["enable_chunked_prefill"] = False
        if all(int(user.get(key) or 1) == 1 for key in _PARALLEL):
            args["distributed_executor_backend"] = "uni"  # one process less to start
    else:
        args["gpu_memory_utilization"] = 0.4  # the trainer's rank lives on the same GPU
    merged = args | {key: value for key, value in user.items() if key != "port"}
    return [word for key, value in merged.items() for word in _flag(key, value)]


def _flag(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def generate_body(request: Request, spec: SamplingSpec) -> dict[str, Any]:
    """JSON body of POST /inference/v1/generate. vLLM seeds sample k with seed + k."""
    return {
        "request_id": request.request_id,
        "token_ids": list(request.prompt_token_ids),
        "sampling_params": {
            "n": spec.n,
            "max_tokens": spec.max_tokens,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "top_k": spec.top_k,
            "seed": stream_seed(request.seed),
            "stop_token_ids": list(spec.stop_token_ids),
            "logprobs": 0,  # the sampled token's only
            "detokenize": False,
        },
    }


def parse_response(answer: dict[str, Any], request: Request, spec: SamplingSpec) -> list[RawRollout]:
    """The spec.n rollouts of one answer. Raises EngineError when the answer is not what was asked for."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    if [choice["index"] for choice in choices] != list(range(spec.n)):
        raise EngineError(f"request {request.request_id} asked for {spec.n} responses and got {len(choices)}")
    return [_rollout(choice, request.request_id) for choice in choices]


def _rollout(choice: dict[str, Any], request_id: str) -> RawRollout:
    tokens = tuple(choice["token_ids"])
    logprobs = tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"])
    spans = tuple(
        VersionSpan(parse_version(span["version"]), span["start"], span["end"])
        for span in choice["weight_versions"] or ()
    )
    reason = choice["finish_reason"]
    covered = [position for span in spans for position in range(span.start, span.end)]
    if len(logprobs) != len(tokens) or covered != list(range(len(tokens))) or reason not in get_args(FinishReason):
        raise EngineError(
            f"response {choice['index']} of request {request_id} is not whole: {len(tokens)} tokens, {len(logprobs)} "
            f"log-probabilities, version spans {spans}, finish reason {reason!r}"
        )
    return RawRollout(tokens, logprobs, reason, spans)
