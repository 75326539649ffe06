"""Log-probabilities of given tokens without ever holding all logits.

With M response tokens and vocabulary V the logits of a micro-batch are M x V numbers (32k x 152k in float32: 19 GiB),
and autograd would keep several copies. Here they exist `chunk` rows at a time, in the forward and again in the backward
pass, and the projection matrix enters one module once a micro-batch, so ZeRO-3 gathers it once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(targets.shape, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        for rows in torch.arange(targets.numel(), device=hidden.device).split(chunk):
            log_p = (hidden[rows] @ weight.t()).float().div_(temperature).log_softmax(-1)
            logprobs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
            entropy[rows] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Frozen where only adapters are trained.
        learns = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learns else None
        for rows in torch.arange(targets.numel(), device=hidden.device).split(ctx.chunk):
            # d logp_target / d logits = (one_hot(target) - softmax) / temperature
            d = (hidden[rows] @ weight.t()).float().div_(ctx.temperature).softmax(-1).neg_()
            d.scatter_add_(1, targets[rows, None], torch.ones_like(d[:, :1]))
            d = (d * (grad[rows, None] / ctx.temperature)).to(hidden.dtype)
            grad_hidden[rows] = d @ weight
            if grad_weight is not None:
                grad_weight += d.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


class TokenLogProbs(nn.Module):
    """The model and its head as one module: token ids in, log-probabilities of the response tokens out."""

    def __init__(self, model: nn.Module, *, temperature: float, chunk: int) -> None:
        super().__init__()
        self.model = model
        self.head = _Head(model.get_output_embeddings(), temperature, chunk)  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        predictor: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(B, L) ids and positions, (M,) flat predictor positions and targets -> (M,) log-probs, (M,) entropies.

        float32; the entropy (nats, at the sampling temperature) carries no gradient.
        """
        hidden = self.model.base_model(  # type: ignore[operator]
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return self.head(hidden.flatten(0, 1).index_select(0, predictor), targets)


class _Head(nn.Module):
    def __init__(self, projection: nn.Linear, temperature: float, chunk: int) -> None:
        super().__init__()
        # In a tuple it is not registered a second time: it belongs to the model, and may be tied to its embedding.
        self._projection = (projection,)
        self.temperature, self.chunk = temperature, chunk

    @property
    def weight(self) -> Tensor:
        """The (V, H) projection matrix, which ZeRO-3 must gather for this module."""
        return self._projection[0].weight

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _TokenLogProbs.apply(hidden, self.weight, targets, self.temperature, self.chunk)
        return result
