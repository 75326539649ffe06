"""Engine and trainer on the same GPUs: whose turn it is to hold the memory, and proof that each gives it back.

    generate -> the engine sleeps -> logprobs, update -> its weights wake -> publication -> its KV cache wakes -> generate

Waking is part of the publication: the engine's `pause` takes the weights' memory and its `resume` the cache's. Free
device memory is measured at the end of each phase, after the trainer's own cache of freed blocks was given back. A
phase after which less and less is free has a leak, and the run ends with its name before it ends for lack of memory; so
does it when an engine says that it sleeps and a node's devices have not got back at least the weights of its servers.

70B bf16 on 8 x 80 GB: the engine's weights take 17.5 GB of a GPU and its KV cache what the recipe allows; asleep it
keeps about 1 GB (its CUDA context and graphs). Sleeping costs nothing on the wire: the weights are dropped, because the
publication brings all of them. None of this has run on a GPU yet; on a CPU nothing is freed and nothing measured.
"""

from __future__ import annotations

from collections.abc import Callable

from grpo_ds.config import EngineConfig
from grpo_ds.dist import Ranks
from grpo_ds.engine.base import GenerationEngine
from grpo_ds.engine.devices import ranks_of

_SETTLING_ROUNDS = 2
"""Rounds that set a phase's baseline: the first ones allocate optimizer state and workspaces that stay."""
_GIB = 2**30


class MemoryDrift(RuntimeError):
    """Less device memory is free after a phase than in the first rounds; the message names phase, rank and amounts."""


class SleepFailed(RuntimeError):
    """An engine did not give its memory back; the message says which node's, and why."""


class Colocation:
    """Told of the end of each phase by every rank; does nothing unless engine.sleep is set."""

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        engine: GenerationEngine | None,
        free: Callable[[], int] | None,
        model_bytes: int,
    ) -> None:
        """engine: on the ranks that lead a node. free: bytes free on this rank's device; null: nothing to measure.

        model_bytes: of the weights that each of the node's servers holds.
        """
        self._on = config.sleep
        self._limit = config.max_memory_drift_gb * _GIB
        self._ranks = ranks
        self._engine = engine
        self._replicas = config.replicas
        self._weights = config.replicas * model_bytes
        self._devices = config.replicas * ranks_of(config)
        self._free = free if config.sleep else None
        self._seen: dict[str, list[int]] = {}

    def after(self, phase: str) -> None:
        """A phase of the round has ended; after `generate` the node's engine is sent to sleep.

        Raises MemoryDrift on this rank, SleepFailed on all.
        """
        self._measure(phase)
        if self._on and phase == "generate":
            lacking = self._sleep()
            self._measure("sleep")
            self._require_freed(lacking)

    def metrics(self) -> dict[str, float]:
        """memory/free_after_PHASE of this rank's device, in GiB, as last measured."""
        return {f"memory/free_after_{phase}": free[-1] / _GIB for phase, free in self._seen.items()}

    def _sleep(self) -> set[int]:
        """Sends the engines to sleep; returns the nodes of which a server is down."""
        reason, slept = None, self._replicas
        if self._engine:
            try:
                slept = self._engine.sleep()
            except Exception as error:  # carried to all ranks: none may compute while an engine holds the memory
                reason = f"node {self._ranks.node}: {error}"
        rows = self._ranks.all_gather([self._ranks.node, slept, reason], "engine sleep")
        if reasons := [reason for *_, reason in rows if reason]:
            raise SleepFailed(f"{self._ranks.where}: an engine did not go to sleep: {reasons[0]}")
        return {node for node, count, _ in rows if count < self._replicas}

    def _require_freed(self, lacking: set[int]) -> None:
        """Whether sleep freed the weights at least, which lie evenly on the devices of the node's servers.

        A node with fewer ranks than devices sees the memory of some of them only. Nothing is asked of those that lack
        a server: it has given its memory back at another time, and which devices were its own is not known here.
        """
        freed = self._seen["sleep"][-1] - self._seen["generate"][-1] if self._free else None
        rows = self._ranks.all_gather([self._ranks.node, freed], "memory that sleep freed")
        for node in sorted({node for node, count in rows if count is not None} - lacking):
            counts = [count for where, count in rows if where == node]
            wanted = self._weights * min(1.0, len(counts) / self._devices)
            if sum(counts) < wanted:
                raise SleepFailed(
                    f"{self._ranks.where}, phase `sleep`: the engine of node {node} says that it sleeps, and "
                    f"{sum(counts) / _GIB:.2f} GiB of device memory were freed, less than the {wanted / _GIB:.2f} GiB of "
                    "its weights alone: look into its log, or set engine.sleep: false"
                )

    def _measure(self, phase: str) -> None:
        if self._free is None:
            return
        seen = self._seen.setdefault(phase, [])
        seen.append(self._free())
        settled = min(seen[:_SETTLING_ROUNDS])
        if len(seen) > _SETTLING_ROUNDS and settled - seen[-1] > self._limit:
            raise MemoryDrift(
                f"{self._ranks.where}, phase `{phase}`, rank {self._ranks.rank}: {seen[-1] / _GIB:.2f} GiB of device "
                f"memory are free after it, {(settled - seen[-1]) / _GIB:.2f} less than in the first rounds "
                f"(engine.max_memory_drift_gb {self._limit / _GIB:g}): something keeps its memory; resume from the last "
                "checkpoint, or set engine.sleep: false"
            )
