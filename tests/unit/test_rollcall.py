"""Who is missing or in the wrong place is named to all ranks, before they wait for each other anywhere else."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch.distributed as dist

from grpo_ds.rollcall import FINE, Place, call, judge

SOUND = [Place(rank, rank % 2, 2, f"n{rank // 2}", "job-a") for rank in range(4)]


def all_say(places: Sequence[Place], world: int, timeout_s: float = 10.0) -> list[str]:
    """What each of these ranks is told, over one real store."""
    wait = datetime.timedelta(seconds=30)
    server = dist.TCPStore("127.0.0.1", 0, world, True, wait, wait_for_workers=False)

    def say(place: Place) -> str:
        store = dist.TCPStore("127.0.0.1", server.port, world, False, wait, wait_for_workers=False)
        return call(store, place, world, timeout_s)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(say, places))


def test_all_who_are_here_go_on() -> None:
    assert all_say(SOUND, 4) == [FINE] * 4


def test_all_learn_who_is_missing_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    assert all_say(SOUND[:2], 4, timeout_s=0.5) == ["no word within 0.5 s from ranks 2, 3 of 4"] * 2
    assert time.monotonic() - started < 4.0
    monkeypatch.setenv("GRPO_DS_NODES", "n0 n1")
    assert all_say([*SOUND[:2], SOUND[3]], 4, timeout_s=0.5) == ["no word within 0.5 s from rank 2 of 4 (n1)"] * 3


def test_what_stops_one_rank_is_told_to_all() -> None:
    places = [*SOUND[:3], replace(SOUND[3], obstacle="interface: no ib0 here")]
    assert all_say(places, 4) == ["rank 3 on n1: interface: no ib0 here"] * 4


def test_nodes_of_different_size_refuse_to_start() -> None:
    """A hostfile of 8 and 4 slots: the ranks would not even agree on the number of nodes."""
    large = [Place(rank, rank, 8, "n0") for rank in range(8)]
    small = [Place(8 + rank, rank, 4, "n1") for rank in range(4)]
    told = all_say([*large, *small], 12)
    assert set(told) == {
        "n1 runs 4 ranks and n0 8: give every node the same number (slots= of the hostfile, --nproc-per-node)"
    }
    alone = [Place(rank, rank, 8, "n0") for rank in range(8)]
    assert judge(alone, range(8, 12), 12, 1.0).startswith("no word within 1 s from ranks 8, 9, 10, 11 of 12")


def test_ranks_that_are_not_in_the_order_of_the_nodes_refuse_to_start() -> None:
    cyclic = [Place(rank, rank // 2, 2, f"n{rank % 2}") for rank in range(4)]
    assert judge(cyclic, [], 4, 1.0).startswith("rank 1 of 4 on n1 is number 0 of 2 there: ")


def test_two_jobs_that_meet_refuse_to_start() -> None:
    other = [replace(place, job="job-b") for place in SOUND]
    assert judge([*SOUND[:2], *other[2:]], [], 4, 1.0).startswith("ranks of different jobs (job-a, job-b) met: ")
    store = dist.HashStore()
    store.set("here/3", json.dumps(asdict(SOUND[3])))
    assert call(store, replace(other[3], node="n9"), 4, 1.0).startswith(
        "rank 3 is here twice, on n1 and on n9 (job-a, job-b): give each job a MASTER_PORT"
    )


def with_terms(*terms: dict[str, str]) -> list[Place]:
    return [replace(place, terms=said) for place, said in zip(SOUND, terms, strict=True)]


def test_nodes_that_have_read_different_things_refuse_to_start() -> None:
    """Each node reads its own checkout; only its lead (ranks 0 and 2) reads the data."""
    said = {"actor.lr": "1e-06", "model.path": "'m'"}
    lead = said | {"the rows of data.train": "sha256 aa"}
    assert all_say(with_terms(lead, said, lead, said), 4) == [FINE] * 4

    mended = lead | {"the rows of data.train": "sha256 bb"}
    told = all_say(with_terms(lead, said, mended, said), 4)
    assert (
        told
        == [
            "rank 0 on n0 and rank 2 on n1 have not read the same: the rows of data.train; give all nodes the same recipe, "
            "options and files"
        ]
        * 4
    )

    faster = {"actor.lr": "2e-06"}
    told = all_say(with_terms(lead, said, lead | faster, said | faster), 4)
    assert set(told) == {
        "rank 0 on n0 and rank 2 on n1 have not read the same: actor.lr (1e-06 and 2e-06); give all nodes the same "
        "recipe, options and files"
    }


def test_a_setting_that_only_one_nodes_code_knows_is_a_difference() -> None:
    known = {"actor.lr": "1e-06"}
    assert "have not read the same: actor.new;" in judge(
        with_terms(known, known, known | {"actor.new": "1"}, {}), [], 4, 1.0
    )


def test_of_many_differences_some_are_named_and_the_rest_counted() -> None:
    first, other = ({f"k{k}": f"{value}" for k in range(9)} for value in "01")
    verdict = judge(with_terms(first, first, other, other), [], 4, 1.0)
    assert "read the same: k0 (0 and 1), k1 (0 and 1), k2 (0 and 1), k3 (0 and 1), k4 (0 and 1) and 4 more;" in verdict
