"""What goes over the wire to vLLM and what comes back: command line, request body, response. Pure."""

from __future__ import annotations

from typing import Any

from grpo_ds.config import EngineConfig
from grpo_ds.engine.base import EngineError, EngineSettings, RawRollout, Request, SamplingSpec, stream_seed
from grpo_ds.engine.wire import command_line, user_options, whole_rollout

NEEDED: dict[str, Any] = {
    "enable_scale_out": True,
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",  # sampling settings of the model folder are not the recipe's
    "worker_extension_cls": "grpo_ds.sync.receive_vllm.WorkerExtension",
    "weight_transfer_config": {"backend": "grpo_ds"},
}
"""Options that `grpo_ds.engine.serve` gives to every server, because updates and log-probabilities depend on them."""
_SAMPLING = (
    *(
        "override_generation_config",
        "logits_processors",
        "watermark*",
        "reasoning_config",
        "scheduler_cls",
        "worker_cls",
    ),
    *("speculative*", "spec_method", "spec_model", "spec_tokens"),
)
"""They would change what is sampled behind the recipe's back; a draft model would also miss the weight updates."""
_OFF = {"min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
"""Said in each request: a server of engine.urls may have been started with other defaults."""
_RESERVED = ("model", "served_model_name", "host", "middleware", *_SAMPLING, *NEEDED)
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def server_args(config: EngineConfig, settings: EngineSettings) -> list[str]:
    """vLLM's command line without host, port and `NEEDED`.

    engine.args overrides our choices under vLLM's own names; the value null removes one. Raises RecipeError for options
    that may not be changed.
    """
    user = user_options(config.args, _RESERVED)
    args: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "seed": settings.seed,
        "block_size": 32,
        "disable_uvicorn_access_log": True,
    }
    if settings.trust_remote_code:
        args["trust_remote_code"] = True
    if settings.device == "cpu":
        args["kv_cache_memory_bytes"] = 256 * 2**20
        args["enforce_eager"] = True  # compiling costs more than a short run gains
        # A seeded request whose prompt is cut into chunks kills the CPU engine of this release.
        args["enable_chunked_prefill"] = False
        if all(int(user.get(key) or 1) == 1 for key in _PARALLEL):
            args["distributed_executor_backend"] = "uni"  # one process less to start
    else:
        args["gpu_memory_utilization"] = 0.4  # the trainer's rank lives on the same GPU
        args["enable_sleep_mode"] = config.sleep  # without it the CPU engine answers the routes, and frees nothing
    return command_line(args, user, flag)


def flag(name: str, on: bool) -> list[str]:
    """The words for a vLLM option that is true or false."""
    return [name if on else f"--no-{name.removeprefix('--')}"]


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
            **_OFF,
        },
    }


def parse_response(answer: dict[str, Any], request: Request, spec: SamplingSpec) -> list[RawRollout]:
    """The spec.n rollouts of one answer. Raises EngineError when the answer is not what was asked for."""
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    if [choice["index"] for choice in choices] != list(range(spec.n)):
        raise EngineError(f"request {request.request_id} asked for {spec.n} responses and got {len(choices)}")
    return [_rollout(choice, request.request_id) for choice in choices]


def _rollout(choice: dict[str, Any], request_id: str) -> RawRollout:
    logprobs = (choice["logprobs"] or {}).get("content") or ()  # null in a response without tokens
    return whole_rollout(
        f"response {choice['index']} of request {request_id}",
        choice["token_ids"],
        [entry["logprob"] for entry in logprobs],
        choice["weight_versions"],
        choice["finish_reason"],
    )
