"""grpo_ds.dist between real processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.dist_workers import SHORT_S, gathered_value, payload
from tests.dist.harness import launch
from tests.e2e.harness import write_project

# The first test of a world size waits for its launch.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("tests.dist.dist_workers:primitives", 3, tmp_path_factory.mktemp("primitives"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Four ranks as two nodes of two."""
    return launch("tests.dist.dist_workers:primitives", 4, tmp_path_factory.mktemp("nodes"), local_world=2)


def test_all_gather_gives_every_rank_all_values_in_rank_order(three: list[Any]) -> None:
    assert [rank["gathered"] for rank in three] == 3 * [[gathered_value(r) for r in range(3)]]


def test_broadcast_gives_rank_0s_value_to_all(three: list[Any]) -> None:
    assert [rank["broadcast"] for rank in three] == 3 * [{"from": 0, "text": "ü" * 500}]


def test_exchange_moves_ragged_bytes_to_their_receiver(three: list[Any]) -> None:
    for receiver, rank in enumerate(three):
        assert rank["exchanged"] == [payload(sender, receiver).hex() for sender in range(3)]
        assert rank["empty"] == ["", "", ""]


def test_sum_and_max_are_in_float64(three: list[Any]) -> None:
    for rank in three:
        assert rank["sum"].dtype == torch.float64
        assert rank["sum"].tolist() == pytest.approx([3.0, 3e-12], rel=1e-12)
        assert rank["max"].tolist() == [0.0]


def test_statistics_that_only_some_ranks_have_are_merged_under_their_own_names(three: list[Any]) -> None:
    wanted = {"loss": 6.0, "policy/a": 5.0, "policy/z": 7.0, "policy/b_max": -4.0, "policy/c_max": 3.0, "bins": [3.0, 3.0]}
    for rank in three:
        assert {name: value.tolist() for name, value in rank["statistics"].items()} == wanted


def test_on_one_node_each_rank_is_a_column(three: list[Any]) -> None:
    assert [rank["column"][0] for rank in three] == [[0], [1], [2]]


def test_across_nodes_the_parts_of_a_column_arrive_at_their_places_and_nowhere_else(nodes: list[Any]) -> None:
    assert [rank["facts"] for rank in nodes] == [
        [0, 2, True, True],
        [0, 2, False, False],
        [1, 2, True, False],
        [1, 2, False, False],
    ]
    for r, rank in enumerate(nodes):
        owners, rows = rank["column"]
        assert owners == [r % 2, 2 + r % 2]
        for owner, row in zip(owners, rows, strict=True):
            assert row.tolist() == [255, *[10 + owner] * 3, 255, *[20 + owner] * 5, 255, 255]


def test_a_peer_that_does_not_come_is_an_error_that_names_the_operation_within_the_deadline(tmp_path: Path) -> None:
    first, second = launch("tests.dist.dist_workers:stalled_peer", 2, tmp_path, timeout_s=120)
    assert second == {}
    assert first["message"].startswith("rank 0: all-gather (filter verdicts) failed at round 7: a peer died or missed")
    assert "5 s (train.collective_timeout_s)" in first["message"]
    assert SHORT_S * 0.8 <= first["seconds"] < SHORT_S * 4


def test_a_peer_that_died_is_an_error_long_before_the_deadline(tmp_path: Path) -> None:
    first, _ = launch("tests.dist.dist_workers:dead_peer", 2, tmp_path, timeout_s=120)
    assert "failed at round 3: a peer died or missed" in first["message"]
    assert first["message"].startswith("rank 0: ")
    assert first["seconds"] < 30


def test_nodes_whose_checkouts_differ_refuse_with_one_sentence_before_a_model_loads(tmp_path: Path) -> None:
    """One node's copy of the data and of the recipe was edited; of two nodes that differ in nothing, both go on."""
    for name in "01":
        (tmp_path / "same" / name).mkdir(parents=True)
        write_project(tmp_path / "same" / name)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    mended = tmp_path / "other" / "1"
    rows = (mended / "train.jsonl").read_text().splitlines(keepends=True)
    (mended / "train.jsonl").write_text("".join([rows[0].replace('"answer": "', '"answer": "1'), *rows[1:]]))
    (mended / "tiny.yaml").write_text((mended / "tiny.yaml").read_text().replace("lr: 1.0e-3", "lr: 2.0e-3"))

    alike = launch("tests.dist.dist_workers:unlike_nodes", 2, tmp_path / "same", local_world=1)
    assert alike == [{"said": "Loaded: "}] * 2
    first, second = launch("tests.dist.dist_workers:unlike_nodes", 2, tmp_path / "other", local_world=1)
    assert first == second
    assert re.fullmatch(
        r"DistError: rank 0 on \S+ and rank 1 on \S+ have not read the same: actor\.lr \(0\.001 and 0\.002\), the rows of "
        r"data\.train; give all nodes the same recipe, options and files",
        first["said"],
    )
