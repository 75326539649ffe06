"""The section `model.lora` of a recipe. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 0
    """Rank r of the adapters, which alone are trained then; 0: off, all weights are. LoRA usually takes an actor.lr ten
    times that of all weights."""
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers that get an adapter, by the last part of their names."""
