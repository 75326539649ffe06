"""The only file that imports deepspeed: process start, model loading, engine building.

Memory at load, 70B bf16 on 8 ranks a node: with ZeRO-3 the parameters are partitioned as they are created (zero.Init),
so a rank holds 1/world of the model and one layer at a time, never 140 GB.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from grpo_ds.actor import cpu_adam
from grpo_ds.actor.ds_json import offloads_optimizer, zero_stage
from grpo_ds.actor.head import TokenLogProbs
from grpo_ds.actor.policy import adam_options
from grpo_ds.config import ActorConfig, ModelConfig, RecipeError
from grpo_ds.dist import Ranks


def device_kind() -> str:
    """cpu, cuda, ... as DeepSpeed sees this machine."""
    return str(get_accelerator().device_name())


def device_count() -> int:
    """Devices that this process may use."""
    return int(get_accelerator().device_count())


def accelerators() -> list[str]:
    """The names of this node's accelerators; empty on a machine without any."""
    if device_kind() == "cpu":
        return []
    devices = torch.get_device_module(device_kind())
    return [str(devices.get_device_name(k)) for k in range(devices.device_count())]


def device(ranks: Ranks) -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().device_name(ranks.local_rank) if device_kind() != "cpu" else "cpu")


def resolve_dtype(model: ModelConfig) -> str:
    """float32 or bfloat16; auto depends on the accelerator (bf16 is several times slower than fp32 on most CPUs)."""
    if model.dtype != "auto":
        return model.dtype
    return "float32" if device_kind() == "cpu" else "bfloat16"


def free_device_memory() -> int:
    """Bytes free on this rank's device, after PyTorch gave back the blocks that it keeps for later."""
    get_accelerator().synchronize()
    get_accelerator().empty_cache()
    # Of all processes; DeepSpeed counts only this one where pynvml is missing.
    return int(torch.accelerator.get_memory_info()[0])


def connect(ranks: Ranks) -> None:
    """Joins torch.distributed first, then hands the group to DeepSpeed.

    In this order no device id is bound to the default group (with one bound, engine groups made later have hung).
    """
    # DeepSpeed would compile a shared-memory all-reduce here, which only tensor-parallel inference uses, and which
    # needs a C++ compiler and leaves files in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device_kind() != "cpu":
        get_accelerator().set_device(ranks.local_rank)
    ranks.connect(get_accelerator().communication_backend_name() if device_kind() != "cpu" else "gloo")
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    # As DeepSpeed's own launcher does: without it each backward on a CPU starts numactl to count devices.
    os.environ.setdefault("LOCAL_SIZE", str(ranks.local_world))


class _Zero3Loading:
    """What transformers asks while it builds a model: the configuration, and whether it is stage 3."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return zero_stage(self.config) == 3


@contextmanager
def _partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    holder = _Zero3Loading(config)
    set_hf_deepspeed_config(holder)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def load_model(model: ModelConfig, path: str, dtype: str, config: dict[str, Any]) -> nn.Module:
    """Reads a Hugging Face causal LM; under ZeRO-3 its parameters are partitioned while they are created."""
    with _partitioned_loading(config):
        loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )
    check_head(loaded, path)
    return loaded


def check_head(model: nn.Module, path: str) -> None:
    """Refuses architectures whose head is more than one matrix product; their log-probabilities would be wrong.

    path: the model in the user's words, for the message. Raises RecipeError.
    """
    config = model.config
    head = model.get_output_embeddings()  # type: ignore[operator]
    extras = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, n, None)]
    if head is None or getattr(head, "bias", None) is not None or extras:
        reason = "a bias" if head is not None and not extras else ", ".join(extras) or "no output embeddings"
        raise RecipeError(
            f"{path}: the head of {type(model).__name__} has {reason}, which the trainer does not support: choose "
            "another model"
        )


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def recompute_activations(model: nn.Module) -> None:
    """Keeps only the input of each decoder layer; the backward pass runs the layer again (gradient checkpointing).

    Inside the modules' own hooks, so ZeRO-3 has gathered a layer's weights when it is run again. transformers' own switch
    works in training mode only, which would turn dropout on. Raises RecipeError where the model names no layers.
    """
    layers = _decoder_layers(model)
    if not layers:
        raise RecipeError(
            f"model.gradient_checkpointing: {type(model).__name__} does not say what its decoder layers are "
            "(_no_split_modules): switch it off"
        )
    for layer in layers:
        # Nothing in a layer is random, because the model is in evaluation mode.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def load_cpu_adam(timeout_s: float) -> None:
    """Has DeepSpeed use a compiled Adam for the CPU; the first process of a machine compiles it within `timeout_s`.

    Raises RecipeError where that is not possible.
    """
    if cpu_adam.NAME in OpBuilder._loaded_ops or installed_ops.get(cpu_adam.NAME):
        return
    from torch.utils.cpp_extension import get_default_build_root  # setuptools, which nothing else here needs

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    versions = (torch.__version__, deepspeed.__version__, *CPUAdamBuilder().cxx_args())
    command = [sys.executable, "-c", "from deepspeed.ops import op_builder; op_builder.CPUAdamBuilder().load()"]
    library = cpu_adam.ensure_library(cpu_adam.library_folder(root, *versions), command, timeout_s)
    OpBuilder._loaded_ops[cpu_adam.NAME] = cpu_adam.load_library(library)


def _optimizer(module: nn.Module, actor: ActorConfig, config: dict[str, Any]) -> torch.optim.Optimizer:
    options = {"lr": actor.lr, **adam_options(actor)}
    trained = [param for param in module.parameters() if param.requires_grad]
    if offloads_optimizer(config):
        return DeepSpeedCPUAdam(trained, **options)
    return torch.optim.AdamW(trained, fused=True, **options)


def build_engine(
    model: nn.Module, config: dict[str, Any], *, temperature: float, chunk: int, actor: ActorConfig | None
) -> Any:
    """A DeepSpeed engine around `TokenLogProbs`; without `actor` it is the frozen reference (ZeRO-Inference)."""
    module: Any = TokenLogProbs(model, temperature=temperature, chunk=chunk)
    if zero_stage(config) == 3:
        # Hooks cost about a millisecond a module: decoder layers are gathered whole.
        if layers := {type(layer) for layer in _decoder_layers(model)}:
            set_z3_leaf_modules(module, list(layers))
        deepspeed.zero.register_external_parameter(module.head, module.head.weight)
    if actor is None:
        module.eval().requires_grad_(False)
        return deepspeed.initialize(model=module, config=config, dist_init_required=False)[0]
    optimizer = _optimizer(module, actor, config)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


@torch.no_grad()
def change_in_place(params: Iterable[nn.Parameter], change: Callable[[Tensor], object]) -> None:
    """Has `change` work on each whole parameter, as the next forward pass and the next publication then see it.

    Every rank calls it with the same change; of a partitioned model each rank holds one whole parameter at a time. The
    optimizer does not learn of it: its next step starts from the weights that it knows.
    """
    for param in params:
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            change(param.data)
