"""The policy under training and the frozen reference, as the loop sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_ds.config import ActorConfig
from grpo_ds.lora import adapters_off

if TYPE_CHECKING:
    from grpo_ds.batching import MicroBatch


class Scorer:
    """Log-probabilities of micro-batches under one DeepSpeed engine (actor or reference)."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.engine = engine
        self.device = device

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(M,) log-probabilities (with gradient when enabled) and (M,) entropies of the response tokens, float32."""
        result: tuple[Tensor, Tensor] = self.engine(*_inputs(micro))
        return result

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch, autocast: torch.dtype | None = None) -> Tensor:
        """(M,) log-probabilities without gradient; `autocast` computes in another dtype (for diagnoses)."""
        if autocast is None:
            return self.forward(micro)[0]
        with torch.autocast(self.device.type, dtype=autocast):
            # Not through the engine, which switches a foreign autocast off.
            result: Tensor = self.engine.module(*_inputs(micro))[0]
            return result

    @torch.no_grad()
    def observe(self, micro: MicroBatch, look: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What `look` makes of the (M, H) hidden states that enter the head and of the whole (V, H) head."""
        seen: list[Tensor] = []
        head = self.engine.module.head
        # DeepSpeed's hooks are older, so they have gathered the head when this one runs.
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(look(inputs[0], head.weight)))
        try:
            self.forward(micro)
        finally:
            hook.remove()
        return seen[0]


class WithoutAdapters(Scorer):
    """The reference of a LoRA policy: the same weights, the adapters off."""

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """As `Scorer.forward`."""
        with adapters_off(self.engine.module):
            return super().forward(micro)

    def logprobs(self, micro: MicroBatch, autocast: torch.dtype | None = None) -> Tensor:
        """As `Scorer.logprobs`."""
        with adapters_off(self.engine.module):
            return super().logprobs(micro, autocast)


def adam_options(actor: ActorConfig) -> dict[str, Any]:
    """AdamW's options of every parameter, but for the learning rate, under torch's names."""
    return {"betas": actor.betas, "eps": actor.adam_eps, "weight_decay": actor.weight_decay}


def _inputs(micro: MicroBatch) -> tuple[Tensor | None, ...]:
    return micro.input_ids, micro.position_ids, micro.attention_mask, micro.predictor, micro.targets


class Policy(Scorer):
    """The actor: accumulates gradients over micro-batches, then steps.

    DeepSpeed divides gradients by the number of ranks W after summing them, and `backward` would divide by the
    accumulation steps. With loss shares s_j (share j over the step's global denominator, Σ_j s_j = the loss):

        grad = (1/W) Σ_ranks Σ_j ∂(W · s_j) = Σ_j ∂ s_j

    so the only correction is the factor W here, with scale_wrt_gas off. Nothing else in the project rescales.
    """

    def __init__(self, engine: Any, device: torch.device, actor: ActorConfig, world: int) -> None:
        super().__init__(engine, device)
        self.actor = actor
        self.world = world
        self.steps_taken = 0

    def backward(self, loss_share: Tensor) -> None:
        """Adds the gradient of this micro-batch's share of the step's loss."""
        self.engine.backward(loss_share * self.world, scale_wrt_gas=False)

    def step(self) -> float:
        """Clips, updates the weights, clears the gradients; returns the global gradient norm before clipping."""
        warmup = self.actor.lr_warmup_steps
        lr = self.actor.lr * min(1.0, (self.steps_taken + 1) / warmup) if warmup else self.actor.lr
        # The others are set again, too: a loaded checkpoint brings those of the run that wrote it.
        options = {"lr": lr, **adam_options(self.actor)}
        for group in self.engine.optimizer.param_groups:
            group.update(options)
        self.engine.step()
        self.steps_taken += 1
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.engine.optimizer.param_groups[0]["lr"])
