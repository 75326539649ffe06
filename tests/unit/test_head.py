"""The chunked head against plain logits: values, gradients, temperature, chunks of every size, no token at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grpo_ds.actor.head import TokenLogProbs


class Inner(nn.Module):
    """Stands in for the transformer below the head: an embedding, and a mixing of neighbours."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Inner:
        hidden = self.embedding(input_ids)
        self.last_hidden_state = (hidden + 0.5 * hidden.roll(1, 1)).tanh()
        return self


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.base_model = Inner(nn.Embedding(13, 6))
        self.lm_head = nn.Linear(6, 13, bias=False)
        if tied:
            self.lm_head.weight = self.base_model.embedding.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def run(*, temperature: float, chunk: int | None, tied: bool, tokens: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, entropies and the gradient of a weighted sum; chunk None: plain logits in float64."""
    torch.manual_seed(4)
    model = Model(tied=tied)
    ids = torch.randint(13, (2, 7))
    predictor, targets = torch.randperm(14)[:tokens], torch.randint(13, (tokens,))
    weights = torch.randn(tokens)
    if chunk is None:
        model, weights = model.double(), weights.double()
        hidden = model.base_model(ids, ids, None, use_cache=False).last_hidden_state.flatten(0, 1)[predictor]
        log_p = (model.lm_head(hidden) / temperature).log_softmax(-1)
        logprobs, entropy = log_p[torch.arange(tokens), targets], -(log_p.exp() * log_p).sum(-1)
    else:
        head = TokenLogProbs(model, temperature=temperature, chunk=chunk)
        logprobs, entropy = head(ids, torch.arange(7).expand(2, 7), None, predictor, targets)
    (logprobs * weights).sum().backward()
    return logprobs.detach(), entropy.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 9, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_entropies_and_gradients_are_those_of_full_logits(temperature: float, chunk: int, tied: bool) -> None:
    found = run(temperature=temperature, chunk=chunk, tied=tied, tokens=9)
    truth = run(temperature=temperature, chunk=None, tied=tied, tokens=9)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1].double(), truth[1].detach(), rtol=0, atol=2e-6)
    assert len(found[2]) == len(truth[2]) == (1 if tied else 2)
    for mine, right in zip(found[2], truth[2], strict=True):
        assert float((mine.double() - right).norm() / right.norm()) < 1e-6


def test_the_temperature_matters() -> None:
    hot, cold = (run(temperature=t, chunk=3, tied=False, tokens=9)[0] for t in (1.0, 0.6))
    assert float((hot - cold).abs().max()) > 1e-2


@pytest.mark.parametrize("chunk", [1, 1000])
def test_no_response_token_gives_empty_values_and_a_zero_gradient_for_every_weight(chunk: int) -> None:
    logprobs, entropy, gradients = run(temperature=1.0, chunk=chunk, tied=False, tokens=0)
    assert logprobs.shape == entropy.shape == (0,)
    assert len(gradients) == 2, "under ZeRO-3 every rank must run the backward pass of every module"
    assert not any(g.any() for g in gradients)


def test_bfloat16_models_give_float32_log_probabilities() -> None:
    model = Model(tied=False).bfloat16()
    ids = torch.randint(13, (1, 5))
    logprobs, entropy = TokenLogProbs(model, temperature=1.0, chunk=2)(
        ids, torch.arange(5)[None], None, torch.arange(4), ids[0, 1:]
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    logprobs.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


def test_the_projection_is_registered_once() -> None:
    names = [name for name, _ in TokenLogProbs(Model(tied=False), temperature=1.0, chunk=2).named_parameters()]
    assert names == ["model.base_model.embedding.weight", "model.lm_head.weight"]
