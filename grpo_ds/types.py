"""The stage types: what flows from one stage of the round to the next.

Prompt -> Rollout -> Scored -> Group -> Sample -> MicroBatch. Each stage makes a new frozen type; nothing is filled in
later. Up to `Group` the values are plain Python (they travel as JSON, and a checkpoint carries surplus groups);
from `Sample` on they are tensors.

Axes: N sequences, T tokens of one sequence (prompt + response), R response tokens, M response tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One draw from the endless prompt order."""

    index: int
    """Position in the endless order (epoch after epoch); the prompt cursor counts these. Unique in a run."""
    row: int
    """Row of the data file, from 0."""
    token_ids: tuple[int, ...]
    """What the engine gets, chat template applied."""
    text: Any
    """The row's prompt as rewards see it: a string, or a list of {"role", "content"} messages."""
    columns: dict[str, Any]
    """All other columns of the row, handed to the reward functions by name."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens [start, end) were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response."""

    token_ids: tuple[int, ...]
    """R sampled tokens, the stop token included when the model ended by itself."""
    logprobs: tuple[float, ...]
    """R log-probabilities of the sampled tokens under the behaviour policy, after temperature."""
    finish_reason: FinishReason
    spans: tuple[VersionSpan, ...]
    """Which policy version made which tokens; the spans cover [0, R)."""
    text: str
    """The decoded response without special tokens, for rewards and for people."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with its score, or with the statement that it cannot be scored."""

    rollout: Rollout
    score: float | None
    """Weighted sum of the reward functions, UNSHAPED; None: cannot be scored. Dynamic sampling looks at this."""
    reward: float | None
    """The score after shaping (overlong penalty); what the estimator gets. None exactly where score is None."""
    parts: dict[str, float | None]
    """Each reward function's own value; None: it does not apply to this response, or failed on it."""
    failed: bool = False
    """One of the functions raised or missed its deadline, so the response has no score, whatever the others say."""

    def metric(self, name: str) -> float | None:
        """`score`, or the value of the reward function of that name; None where any function failed."""
        if self.failed:
            return None
        return self.score if name == "score" else self.parts[name]


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one prompt."""

    prompt: Prompt
    members: tuple[Scored, ...]
    baseline: Scored | None = None
    """The greedy response, for estimators that need one (ReMax): scored, counted in the cost, never trained on."""

    @property
    def versions(self) -> set[int]:
        """The policy versions that made its members' tokens."""
        return {span.version for member in self.members for span in member.rollout.spans if span.end > span.start}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on. Every per-token array has the length T of `token_ids`."""

    prompt_index: int
    token_ids: Tensor
    """(T,) int64, prompt then response."""
    response_mask: Tensor
    """(T,) bool, True on tokens the policy sampled and the loss may use."""
    rollout_logprobs: Tensor
    """(T,) float32, the engine's log-probability of token t; 0 on tokens that the policy did not sample."""
    advantages: Tensor
    """(T,) float32; 0 on tokens that the policy did not sample."""
    versions: Tensor
    """(T,) int64, the policy version that sampled token t; -1 on tokens that the policy did not sample."""
