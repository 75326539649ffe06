"""LoRA (arXiv 2106.09685): weights W' = W + (alpha / rank) B A, of which only A (r, in) and B (out, r) are trained.

The forward pass multiplies by W' itself, computed in float32 and rounded once to the model's dtype: what is trained is
exactly the model that the engines are given. The usual side branch (x A) B would be another one in 16 bits, where a
small B A is rounded away when it is added to W. W' exists for one module at a time, in the forward pass and again in
the backward, where a 16-bit W takes 10 bytes an element meanwhile; it costs r / tokens of a pass's multiplications.

Bytes at 70B, rank 16, all seven targets: 207M trained numbers, 0.3 % of the model, and only they have gradients,
optimizer state and a place in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ds.config import LoraConfig, RecipeError
from grpo_ds.seeds import derive_seed


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Some rows of W (rows, in), A (r, in) and the same rows of B (rows, r) -> these rows of W', in W's dtype."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def merge_slice(part: Tensor, start: int, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """A flat piece of W (row-major, from element `start` on) -> the same piece of W'.

    It may begin and end within a row; what lies behind the end of W is padding and stays as it is.
    """
    out, width = b.shape[0], a.shape[1]
    used = min(part.numel(), out * width - start)
    if used <= 0:
        return part
    first, last = start // width, -(-(start + used) // width)
    skip = start - first * width
    rows = part.new_zeros((last - first) * width)
    rows[skip : skip + used] = part[:used]
    merged = merge(rows.view(-1, width), a, b[first:last], scale).flatten()
    return torch.cat([merged[skip : skip + used], part[used:]])


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return x @ merge(weight, a, b, scale).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad @ merge(weight, a, b, ctx.scale) if ctx.needs_input_grad[0] else None
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        # The gradient of W' would be grad^T x; rounding counts as the identity.
        grad_a = (grad @ b).t() @ x * ctx.scale
        grad_b = grad.t() @ (x @ a.t()) * ctx.scale
        return grad_x, None, grad_a, grad_b, None


class LoraLinear(nn.Linear):
    """A linear layer with an adapter of its own. Layers become one in place, so no parameter changes its name."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    lora_on: bool

    @classmethod
    def adapt(cls, layer: nn.Linear, rank: int, alpha: float, seed: int) -> None:
        """Makes `layer` one of this class; it computes the same as before, because B begins as zeros."""
        bound = 1 / math.sqrt(layer.in_features)
        random = torch.Generator().manual_seed(seed)
        # Sizes by name: under ZeRO-3 the weight has none.
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=random)
        layer.lora_A = nn.Parameter(a.to(layer.weight))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank).to(layer.weight))
        layer.__class__ = cls
        layer.lora_scale, layer.lora_on = alpha / rank, True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.lora_on:
            return super().forward(x)
        y: Tensor = _MergedLinear.apply(x, self.weight, self.lora_A, self.lora_B, self.lora_scale)
        return y if self.bias is None else y + self.bias


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters by their names in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model computes with W, as before training."""
    before = [(layer, layer.lora_on) for layer in adapters_of(model).values()]
    for layer, _ in before:
        layer.lora_on = False
    try:
        yield
    finally:
        for layer, on in before:
            layer.lora_on = on


def find_targets(model: Any, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose last name is one of `targets`, by name.

    Raises RecipeError when there is none for a target, or a layer shares its weight with another module.
    """
    # Whose product `TokenLogProbs` computes, not the layer itself.
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    last = {name: name.rpartition(".")[2] for name in linear}
    if missing := sorted(set(targets) - set(last.values())):
        raise RecipeError(
            f"model.lora.targets: {type(model).__name__} has no linear layer named {', '.join(missing)}: choose from "
            f"{', '.join(sorted(set(last.values()))) or 'nothing, LoRA does not fit this model'}"
        )
    found = {name: layer for name, layer in linear.items() if last[name] in targets}
    weights = [id(m.weight) for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    if shared := [name for name, layer in found.items() if weights.count(id(layer.weight)) > 1]:
        raise RecipeError(f"model.lora.targets: {shared[0]} shares its weight with another layer: leave it out")
    return found


def add_adapters(model: Any, lora: LoraConfig, seed: int) -> None:
    """Freezes the model and gives its target layers adapters, the same on every rank; with rank 0 it does nothing."""
    if lora.rank:
        model.requires_grad_(False)
        # ZeRO-3 gives a layer's weights back when the gradients of its inputs are there, so the first layer needs one.
        model.enable_input_require_grads()
        for name, layer in find_targets(model, lora.targets).items():
            LoraLinear.adapt(layer, lora.rank, lora.alpha, derive_seed(seed, "lora", name))
