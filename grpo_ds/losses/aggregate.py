"""The one reduction: token losses of a micro-batch -> its share of the loss of the whole optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_ds.config import RecipeError
from grpo_ds.losses.base import sequence_lengths

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class Totals:
    """Counts of the whole optimizer step: all micro-batches of all ranks."""

    tokens: float
    """Response tokens with a loss."""
    sequences: float
    """Sequences with at least one such token."""
    max_response_tokens: int
    """The recipe's longest response, the constant C of `seq-mean-token-sum-norm`; never the padded width."""


def aggregate(token_loss: Tensor, sequence_index: Tensor, mode: str, totals: Totals) -> Tensor:
    """This micro-batch's share of the step's loss, a scalar; the shares of all micro-batches and ranks sum to it.

    Args: token_loss (M,), sequence_index (M,) int64 not decreasing. With S = totals.sequences and L_i the tokens of
    sequence i (all of them are here, a sequence is never split):

    - `token-mean` (DAPO): sum of l / totals.tokens
    - `seq-mean-token-mean` (the GRPO paper): sum of l_it / L_i, over S
    - `seq-mean-token-sum`: sum of l / S
    - `seq-mean-token-sum-norm` (Dr.GRPO): sum of l / (S * totals.max_response_tokens)

    DeepSpeed divides gradients by the number of ranks; that is undone by the caller, not here. M = 0 gives a zero that
    can be differentiated. Raises RecipeError for an unknown mode, ValueError for totals that miss what is here.

    >>> import torch
    >>> loss, index, totals = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), Totals(3, 2, 10)
    >>> [aggregate(loss, index, mode, totals).item() for mode in MODES[:3]]
    [3.0, 3.5, 4.5]
    >>> round(aggregate(loss, index, "seq-mean-token-sum-norm", totals).item(), 6)
    0.45
    """
    if mode not in MODES:
        raise RecipeError(f"no loss aggregation is called {mode!r} (there are: {', '.join(MODES)})")
    if token_loss.shape != sequence_index.shape:
        raise ValueError(
            f"token_loss {tuple(token_loss.shape)} and sequence_index {tuple(sequence_index.shape)} differ in shape"
        )
    if token_loss.numel() == 0:
        return token_loss.sum()
    if totals.tokens < token_loss.numel() or totals.sequences < 1 or totals.max_response_tokens < 1:
        raise ValueError(
            f"totals must count the whole step, but {totals} is less than this micro-batch of {token_loss.numel()} tokens"
        )
    if mode == "token-mean":
        return token_loss.sum() / totals.tokens
    if mode == "seq-mean-token-mean":
        return (token_loss / sequence_lengths(sequence_index).to(token_loss.dtype)).sum() / totals.sequences
    if mode == "seq-mean-token-sum":
        return token_loss.sum() / totals.sequences
    return token_loss.sum() / (totals.sequences * totals.max_response_tokens)
