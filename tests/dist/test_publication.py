"""Publications of real ranks through a process group of their own, and under the stage that partitions nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import cases

pytestmark = pytest.mark.timeout(600)

CASES = [
    (1, "untied/partitioned/float32/group"),
    (2, "untied/partitioned/float32/group"),
    (2, "untied/stage0/bfloat16/group"),
    (4, "untied/partitioned/float32/group"),
]


@pytest.mark.parametrize(("ranks", "variant"), CASES, indirect=["ranks"])
def test_what_arrives_in_the_group_is_the_policy_bit_for_bit(ranks: list[Any], variant: str, folder: Path) -> None:
    dtype = getattr(torch, variant.split("/")[2])
    start = {name: p.detach() for name, p in cases.read_model(folder / "untied", dtype).named_parameters()}
    # The four are two nodes of two, each with an engine and a group of its own.
    for rank in ranks[::2] if len(ranks) == 4 else ranks[:1]:
        result = rank["sync"][variant]
        assert result["buckets"] > 8
        assert same(result["first"], start)
        assert same(result["second"], result["held"])
        assert not same(result["second"], result["first"]), "the optimizer step must show in the second publication"


@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_shards_cross_nodes_in_one_collective_a_bucket_and_within_a_node_in_none(ranks: list[Any]) -> None:
    for rank in ranks:
        found = {name: result["exchanges a bucket"] for name, result in rank["sync"].items() if "/" in name}
        assert len(found) >= 3
        assert set(found.values()) == {1 if len(ranks) == 4 else 0}, found


@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_weights_changed_in_place_are_what_is_published_under_every_stage_and_can_be_put_back(ranks: list[Any]) -> None:
    """As the self-test changes them: partitioned, kept whole beside their partition (small ones), and never partitioned."""
    for rank in ranks[::2]:
        variants = {name: result for name, result in rank["sync"].items() if "/" in name}
        assert len(variants) >= 3
        for result in variants.values():
            assert same(result["negated"], {name: -tensor for name, tensor in result["held"].items()})
            assert same(result["put back"], result["held"])


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
