"""The parity gate: engine and trainer must agree about a fixed probe, or the run stops with the cause."""

from grpo_ds.parity.gate import Answers, ParityError, ParityGate

__all__ = ["Answers", "ParityError", "ParityGate"]
