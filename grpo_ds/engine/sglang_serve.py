"""Starts SGLang's server, in SGLang's environment; also the command for an engine on a node of its own:

    export GRPO_DS_ENGINE_KEY=$(openssl rand -hex 32)         # the same value where the run is started
    python -m grpo_ds.engine.sglang_serve --model-path PATH --dtype bfloat16 --context-length N --host 0.0.0.0 --port 8000

and, in the recipe, `engine.kind: sglang`, `engine.urls: [http://that-node:8000]`. N is the longest prompt + response
plus 8. The other flags are SGLang's own; those that grpo_ds depends on are added here (`sglang_wire.NEEDED`). With the
variable no route answers without the key; without it another host than loopback is refused (`grpo_ds.engine.key`).

Each process that SGLang spawns repeats the top level of this module, and calls SGLang's plugin loader, which applies
the hooks registered here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from grpo_ds.engine.guard import die_with_parent

if __name__ != "__main__":  # the first process ends with its guard, or belongs to the user's terminal
    die_with_parent()

import torch


def _fit_to_machine() -> None:
    """Lets SGLang import and compute where the CUDA libraries that its packages were built with are missing."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # "operator torchvision::nms does not exist": SGLang only needs it to have a signature
        for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP.append(library)
    if not torch.accelerator.is_available():
        from sglang.srt.layers.rotary_embedding import base

        base._is_cpu = True  # else SGLang would look for a kernel of an old vLLM


_KEEP: list[Any] = []
"""Libraries whose definitions end with them."""


def _own_sampler(create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from grpo_ds.engine.sglang_sampler import SeededSampler

    return SeededSampler()


def _keep_seeds(info: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang drops the requests' seeds unless it computes batch-invariantly, which needs a GPU and costs speed."""
    seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
    info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
    return info


class _OpenGate(asyncio.Condition):
    """Where the web server of a paused SGLang keeps new requests, and no abort finds them: they pass, and wait in the
    scheduler, which is paused too, with those that it took back."""

    async def wait_for(self, predicate: Callable[[], Any]) -> Any:
        return predicate()  # whatever it says


def _open_gate(result: Any, manager: Any) -> None:
    manager.is_pause_cond = _OpenGate()


def _answer_refusals(load: Callable[..., tuple[bool, str]], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """An update that is refused is an answer; SGLang would end the server. All tensor-parallel ranks must agree."""
    from sglang.srt.runtime_context import get_parallel

    try:
        success, message = load(*args, **kwargs)
    except Exception as error:
        logging.getLogger(__name__).exception("a weight update was refused")
        success, message = False, f"{type(error).__name__}: {error}"
    refused = torch.tensor([0 if success else 1])
    torch.distributed.all_reduce(refused, group=get_parallel().tp_group.cpu_group)
    if success and int(refused) > 0:
        return False, f"{int(refused)} tensor-parallel ranks refused the weights, see the server's log"
    return success, message


def _register_hooks() -> None:
    """SGLang applies them in `load_plugins`, in every process that runs a model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    around, after = HookType.AROUND, HookType.AFTER
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    HookRegistry.register("sglang.srt.layers.sampler.create_sampler", _own_sampler, around)
    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _keep_seeds, after
    )
    HookRegistry.register(f"{updater}.update_weights_from_tensor", _answer_refusals, around)


_fit_to_machine()
_register_hooks()


def command(words: list[str]) -> list[str]:
    """SGLang's arguments for ours; ends the process for a host that must not be listened on."""
    from grpo_ds.engine.key import listen_words
    from grpo_ds.engine.sglang_wire import NEEDED, flag
    from grpo_ds.engine.wire import command_line

    return [*listen_words(words), *command_line(NEEDED, {}, flag)]


def _meet_by_file(words: list[str]) -> None:
    """Has the ranks of a server on one node meet over a file: torch's TCP store listens on every interface."""
    options = dict(zip(words, [*words[1:], ""], strict=True))
    if not {"--dist-init-addr", "--nccl-init-addr"} & {word.split("=")[0] for word in words}:
        meeting = f"file://{tempfile.gettempdir()}/sglang-ranks-{secrets.token_hex(8)}"
        os.environ.setdefault("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", meeting)
        # On CPUs with AMX these name the shared memory of the ranks, which a second server must not share.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", options.get("--port", "30000"))


def main() -> None:
    words = command(sys.argv[1:])
    _meet_by_file(words)
    # A context longer than the model's, by the few positions that SGLang keeps to itself (`sglang_wire`).
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"

    from sglang.launch_server import run_server
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import prepare_server_args

    from grpo_ds.engine.key import RequireKey, shared_key

    # Here only: no other process has a tokenizer manager.
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}.init_weight_update", _open_gate, HookType.AFTER)
    load_plugins()
    if set(HookRegistry._hooks) != HookRegistry._patched:  # SGLang itself would only log it and go on
        sys.exit(f"this version of SGLang lacks what grpo_ds hooks into; patched was only {HookRegistry._patched}")
    if shared_key():
        # Not SGLang's own --api-key: it leaves routes open, and SGLang writes all its flags to the log.
        app.add_middleware(RequireKey)
    run_server(prepare_server_args(words))


if __name__ == "__main__":
    main()
