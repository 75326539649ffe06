"""What saves memory changes no gradient: recomputed activations, and 16-bit weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist.memory import MICRO_BATCHES, STAGES

# The first test of a world size waits for its launch.
pytestmark = pytest.mark.timeout(600)
LAYERS = 2


@pytest.mark.parametrize("config", ["partitioned", "stage2"])
def test_recomputed_activations_save_memory_and_change_nothing(world_2: list[Any], config: str) -> None:
    for rank in world_2:
        plain, recomputed = (rank["recomputation"][f"{config}/{on}"] for on in (False, True))
        assert plain["runs"] == LAYERS * len(MICRO_BATCHES)
        assert recomputed["runs"] == 2 * plain["runs"], "each layer runs once more in the backward pass"
        # Of a layer's dozen intermediate results only its input is left; what remains beside it is the head's.
        assert recomputed["kept"] < plain["kept"] / 4
        assert all(map(torch.equal, plain["logprobs"], recomputed["logprobs"]))
        assert plain["moments"].norm() > 0
        difference = (recomputed["moments"] - plain["moments"]).norm() / plain["moments"].norm()
        assert difference <= 1e-6


@pytest.mark.parametrize("config", STAGES)
def test_a_gradient_in_bfloat16_does_not_depend_on_how_often_it_is_added_to(world_2: list[Any], config: str) -> None:
    """32 passes of 1/32 of the loss: each gradient is exactly 1/32 of the whole one, because a power of two changes no
    digit. Their sum needs 5 bits more than bfloat16's 8, which float32 has; in bfloat16 it was wrong by 1.6 %."""
    for rank in world_2:
        whole, pieces = rank["pieces"][config]["moments"]
        assert whole.norm() > 0
        assert (pieces - whole).norm() / whole.norm() <= 1e-5
        first, second = rank["pieces"][config]["norms"]
        assert second == pytest.approx(first, rel=1e-5)
