"""The contract of policy losses (entry-point group `grpo_ds.losses`).

A policy loss is a class whose fields are its options and whose `__call__` is

    (logprobs (M,), old_logprobs (M,), advantages (M,), sequence_index (M,)) -> (token_loss (M,), stats)

over the M response tokens of a packed micro-batch. `sequence_index` (int64) does not decrease, and no sequence is split
over micro-batches. M may be 0: the result is then an empty tensor that can still be differentiated. Gradients flow
through `logprobs` alone. Importance weights, KL and the reduction are applied outside (`aggregate`).

`stats` maps names to tensors of one element. Each is a SUM over the tokens: the trainer adds it over micro-batches and
ranks and logs `policy/<name>`, without a trailing `_sum` or `_tokens`, as a mean over the round's tokens. A name that
ends in `_max` is a MAXIMUM instead, taken over micro-batches and ranks and logged as it is. A name may be missing where
there is nothing to say, as of the maximum of no tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_ds.plugins import Registry

LOG_RATIO_LIMIT = 20.0
"""|log ratio|, of a token or a sequence, above which its exp() says nothing any more; part of the definition, no knob."""

REGISTRY = Registry(
    group="grpo_ds.losses",
    kind="policy loss",
    arguments=("logprobs", "old_logprobs", "advantages", "sequence_index"),
)
register = REGISTRY.register


def get_policy_loss(name: str, **options: Any) -> Any:
    """Build a policy loss: a built-in, an entry point, `package.module.Name` or `path/file.py:Name`.

    Raises RecipeError for an unknown name, a broken plugin, and options it does not take.
    """
    return REGISTRY.build(name, options)


def sequence_means(values: Tensor, sequence_index: Tensor) -> Tensor:
    """(M,) -> (M,): each token gets the mean of its sequence; differentiable.

    >>> sequence_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).tolist()
    [2.0, 2.0, 5.0]
    """
    return sequence_sums(values, sequence_index) / sequence_lengths(sequence_index).to(values.dtype)


def sequence_sums(values: Tensor, sequence_index: Tensor) -> Tensor:
    """(M,) -> (M,): each token gets the sum over its sequence; differentiable."""
    _, inverse = torch.unique_consecutive(sequence_index, return_inverse=True)
    return values.new_zeros(values.shape).index_add(0, inverse, values)[inverse]


def sequence_lengths(sequence_index: Tensor) -> Tensor:
    """(M,) -> (M,) int64: each token gets the number of tokens of its sequence.

    >>> sequence_lengths(torch.tensor([0, 0, 3])).tolist()
    [2, 2, 1]
    """
    _, inverse, counts = torch.unique_consecutive(sequence_index, return_inverse=True, return_counts=True)
    return counts[inverse]
