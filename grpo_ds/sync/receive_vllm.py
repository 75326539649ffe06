"""Weight updates inside vLLM's worker processes: registers the weight-transfer backend "grpo_ds" when imported.

vLLM imports this module because of `--worker-extension-cls grpo_ds.sync.receive_vllm.WorkerExtension`, before it makes
its transfer engine. Only vLLM's processes may import it; neither DeepSpeed nor the rest of grpo_ds is needed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.distributed.parallel_state import GroupCoordinator, get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS, get_numel_loaded
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from grpo_ds.sync.receive import BucketReader, NameLedger

Place = tuple[nn.Module, str]
"""A layer, and the name of one of its parameters."""

BACKEND = "grpo_ds"
_ERROR_BYTES = 1000
"""Of a worker's message, as the others hear of it."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Sent before each update."""

    names: list[str]
    """Every tensor the update will carry, by Hugging Face name."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A bucket manifest (`grpo_ds.sync.receive`)."""

    nbytes: int
    tensors: list[dict[str, Any]]
    sums: dict[str, int] = field(default_factory=dict)
    path: str | None = None
    ipc: dict[str, Any] | None = None
    group: dict[str, Any] | None = None


class BucketEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads buckets with vLLM's layerwise reload, as vLLM's own backends do."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader = BucketReader()
        self._ledger: NameLedger | None = None
        self._layers_open = False
        self._layers: list[LayerReloadingInfo] = []
        self._tied: list[list[Place]] = []

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._ledger = NameLedger(init_info.names)

    @contextmanager
    def _as_one(self) -> Iterator[None]:
        """What fails on any worker is raised by the last one of each executor, and by no other.

        vLLM reads the workers' answers in their order, and at the first error it leaves the rest unread: from then on it
        would take each of those for the answer to the next call, and a bucket for loaded that still is being read.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # told to the others, and raised below
            error = raised
        workers = get_world_group()
        if workers.world_size == 1:
            if error is not None:
                raise error
        elif (reason := _errors_of_all(error, workers)) and (workers.rank + 1) % self.parallel_config.world_size == 0:
            raise RuntimeError(reason) from error

    def start_weight_update(self) -> None:
        with self._as_one():
            self._start()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with self._as_one(), self._every_core():
            self._receive(update_info)

    def finish_weight_update(self) -> None:
        with self._as_one(), self._every_core():
            self._finish()

    @contextmanager
    def _every_core(self) -> Iterator[None]:
        """On CPU layers are copied and repacked with all cores: the server is paused, and only writers of buckets run."""
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _start(self) -> None:
        if self._layers_open:
            # The last update failed half-way. Its remains are closed, so that what the layers still hold of it cannot
            # be counted as part of the new update, which replaces every tensor.
            finalize_layerwise_reload(self.model, self.model_config)
        self._tied = _tied(self.model)  # during a reload each layer has tensors of its own
        initialize_layerwise_reload(self.model)
        self._layers_open = True
        self._layers = [get_layerwise_info(module) for module in self.model.modules()]

    def _receive(self, update_info: UpdateInfo) -> None:
        assert self._ledger is not None, "init_weight_transfer_engine comes before the first update"
        self._ledger.check(entry["name"] for entry in update_info.tensors)
        mapped: set[int] = set()

        def views() -> Iterator[tuple[str, Tensor]]:
            for name, view in self._reader.tensors(dict(vars(update_info))):
                mapped.add(view.untyped_storage().data_ptr())
                yield name, view.to(self.device)  # from host memory to an accelerator this is the transfer itself

        with disable_mtp_completeness_check():
            self.model.load_weights(views())
        self._keep_unfinished(mapped)
        self._ledger.arrived(entry["name"] for entry in update_info.tensors)

    def _keep_unfinished(self, mapped: set[int]) -> None:
        """Copies what layers still hold of the bucket, whose memory the next one overwrites.

        A layer keeps its tensors until its last one arrived, which may be in a later bucket. mapped: addresses of the
        storages that are the bucket's memory.
        """
        for layer in self._layers:
            for _, call in layer.loaded_weights:
                for key, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in mapped:
                        call.arguments[key] = value.clone()

    def _finish(self) -> None:
        assert self._ledger is not None, "init_weight_transfer_engine comes before the first update"
        # Before anything is closed: after this error the missing tensors can still be sent.
        self._ledger.require_complete()
        _require_whole(self.model, self._tied)
        finalize_layerwise_reload(self.model, self.model_config)
        self._layers_open = False
        # On CPU a head computes with a repacked copy. A tied head is never sent, so it still has the old one.
        for module in [module for places in self._tied for module, _ in places]:
            if _is_head(module):
                _repack(module, self.model)

    def shutdown(self) -> None:
        self._reader.close()


def _errors_of_all(error: Exception | None, workers: GroupCoordinator) -> str:
    """What went wrong on any of the workers, each reason once; the same on every worker, empty if nothing did."""
    text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:_ERROR_BYTES]
    mine = torch.frombuffer(bytearray(text.ljust(_ERROR_BYTES, b"\0")), dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in range(workers.world_size)]
    dist.all_gather(rows, mine, group=workers.cpu_group)
    found = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    return "; ".join(dict.fromkeys(filter(None, found)))


def _tied(model: nn.Module) -> list[list[Place]]:
    """Parameters that several layers share, each with all its places."""
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    return [several for several in places.values() if len(several) > 1]


def _require_whole(model: nn.Module, tied: list[list[Place]]) -> None:
    """Raises ValueError for parameters that the open update did not fill.

    vLLM would keep the old tensor of a layer that nothing reached, and take what happens to be in memory for the rest
    of one that was partly reached (q of qkv). It is enough that a shared parameter was filled in one place.
    """
    lacking = {
        (module, name): f"{path}.{name} ({loaded} of {wanted} elements)"
        for path, module in model.named_modules()
        for name, loaded, wanted in _unfilled(module)
    }
    for places in tied:
        if any(place not in lacking for place in places):
            for place in places:
                lacking.pop(place, None)
    if lacking:
        some = ", ".join(sorted(lacking.values())[:5])
        raise ValueError(
            f"{len(lacking)} parameters of the engine's model were not, or only partly, reached by the weight update, "
            f"among them {some}"
        )


def _unfilled(layer: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, loaded, wanted) in elements for a layer's parameters of which something is missing in the open update."""
    info = get_layerwise_info(layer)
    # A layer that got everything was processed at once and is closed. Attention layers hold scales of the KV cache, which
    # come with a checkpoint only if it is quantized.
    if not info.can_load() or is_deferred_attention_layer(layer):
        return
    loaded: Counter[str] = Counter()
    for name, call in info.loaded_weights:
        loaded[name] += get_numel_loaded(_get_original_loader(getattr(layer, name)), call)[0]
    for name, parameter in layer.named_parameters(recurse=False):
        wanted = get_tensor_load_numel(parameter)
        if isinstance(layer, VocabParallelEmbedding):  # whose last rows may be padding
            wanted = wanted // parameter.shape[0] * layer.shard_indices.num_org_elements
        # What vLLM never counts are tables of which expert is where, and buffers of the trainer.
        if loaded[name] < wanted and name not in SKIP_LOAD_TENSORS:
            yield name, loaded[name], wanted


def _repack(head: ParallelLMHead, model: nn.Module) -> None:
    """Has a tied head compute with its embedding's new weights; on CPU both then share one packed copy."""
    owners = (m for m in model.modules() if m is not head and getattr(m, "weight", None) is head.weight)
    packed = getattr(next(owners, None), "cpu_linear", None)
    if packed is not None:
        head.cpu_linear = packed
    else:
        head.quant_method.process_weights_after_loading(head)


def _is_head(module: nn.Module) -> TypeGuard[ParallelLMHead]:
    return isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod)


class WorkerExtension:
    """Mixed into vLLM's worker class; importing its module is what registers the backend."""

    def abandon_weight_update(self) -> None:
        """Before an update: one that failed half-way stays open on the workers on which it did not, and bars the next."""
        self._weight_update_active = False


WeightTransferEngineFactory.register_engine(BACKEND, BucketEngine)
