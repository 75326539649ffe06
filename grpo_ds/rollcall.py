"""Before anything is set up between the ranks, each one says that it is here, where, and what is wrong with it.

So a rank that is missing is named after a deadline of its own, which is far shorter than that of a collective, and ranks
that cannot work together refuse with the same sentence everywhere, instead of waiting for each other.

Rank 0 reads what all have said and answers once, through the store at MASTER_ADDR: ~4 KB from a rank of a run, which says
what it has read (`grpo_ds.agreement`), 2 MB at 512 ranks; ~200 B to it.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FINE = "fine"
MISSING = "no word"
"""A verdict that begins so names ranks that did not come."""
DIGEST = "sha256 "
"""Stands in a term before the digest of something too long to be shown."""
_SHOWN = 5
"""Differences that a verdict names."""
_HEARD_S = 5.0
"""Rank 0 holds the store: after bad news it waits so long for the others to have read them."""


@dataclass(frozen=True)
class Place:
    """Who and where a rank is; travels as JSON."""

    rank: int
    local_rank: int
    local_world: int
    node: str
    """Name of its machine."""
    job: str = ""
    """The launcher's word for the job (GRPO_DS_JOB); empty where it gave none."""
    obstacle: str = ""
    """Why this rank cannot go on; empty: it can."""
    terms: dict[str, str] = field(default_factory=dict)
    """What it has read, by name; rank 0 has every name, and the texts must be the same."""


def call(store: Any, mine: Place, world: int, timeout_s: float) -> str:
    """Returns FINE, or what is wrong in one sentence, the same on every rank. Every rank calls it.

    store: a torch.distributed.Store that all ranks share. Raises torch's DistError (a RuntimeError) when it goes away.
    """
    text = json.dumps(asdict(mine))
    first = Place(**json.loads(store.compare_set(f"here/{mine.rank}", "", text)))
    if first != mine:
        return (
            f"rank {mine.rank} is here twice, on {first.node} and on {mine.node}{_of_jobs([first, mine])}: give each job "
            "a MASTER_PORT of its own"
        )
    if mine.rank == 0:
        places, missing = _listen(store, world, timeout_s)
        verdict = judge(places, missing, world, timeout_s)
        store.set("verdict", verdict)
        if verdict != FINE:
            _let_them_hear(store, len(places) - 1)
        return verdict
    # A little longer than rank 0 waits, so that its sentence arrives.
    store.wait(["verdict"], datetime.timedelta(seconds=timeout_s + 2 * _HEARD_S))
    verdict = store.get("verdict").decode()
    store.add("heard", 1)
    return str(verdict)


def _listen(store: Any, world: int, timeout_s: float) -> tuple[list[Place], list[int]]:
    """(who is here, ranks that are not)"""
    deadline = time.monotonic() + timeout_s
    places, missing = [], []
    for rank in range(world):
        key = f"here/{rank}"
        while not (here := store.check([key])) and time.monotonic() < deadline:
            time.sleep(0.05)
        if here:
            places.append(Place(**json.loads(store.get(key))))
        else:
            missing.append(rank)
    return places, missing


def _let_them_hear(store: Any, others: int) -> None:
    deadline = time.monotonic() + _HEARD_S
    while store.add("heard", 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)


def judge(places: Sequence[Place], missing: Sequence[int], world: int, timeout_s: float) -> str:
    """FINE, or the first thing that keeps the ranks from working together."""
    for place in places:
        if place.obstacle:
            return f"rank {place.rank} on {place.node}: {place.obstacle}"
    if len({place.job for place in places}) > 1:
        return f"ranks of different jobs{_of_jobs(places)} met: give each job a MASTER_PORT of its own"
    sizes = {place.local_world: place for place in places}
    if len(sizes) > 1:
        (few, some), *_, (many, other) = sorted(sizes.items())
        return (
            f"{some.node} runs {few} ranks and {other.node} {many}: give every node the same number (slots= of the "
            "hostfile, --nproc-per-node)"
        )
    if missing:
        return f"{MISSING} within {timeout_s:g} s from {_ranks(missing, places, world)}"
    for place in places:
        if place.local_rank != place.rank % place.local_world or world % place.local_world:
            return (
                f"rank {place.rank} of {world} on {place.node} is number {place.local_rank} of {place.local_world} there: "
                "give every node the same number of ranks, one after the other"
            )
    return _unlike(places) or FINE


def _unlike(places: Sequence[Place]) -> str:
    """Which rank has not read what rank 0 has; empty: all have."""
    first = places[0]
    for place in places:
        unlike = [what for what, text in place.terms.items() if first.terms.get(what) != text]
        if unlike:
            shown = [_both(what, first.terms.get(what, ""), place.terms[what]) for what in unlike[:_SHOWN]]
            more = f" and {len(unlike) - _SHOWN} more" if len(unlike) > _SHOWN else ""
            return (
                f"rank {first.rank} on {first.node} and rank {place.rank} on {place.node} have not read the same: "
                f"{', '.join(shown)}{more}; give all nodes the same recipe, options and files"
            )
    return ""


def _both(what: str, one: str, other: str) -> str:
    digests = not one or DIGEST in one + other
    return what if digests else f"{what} ({one} and {other})"


def _of_jobs(places: Sequence[Place]) -> str:
    jobs = sorted({place.job for place in places if place.job})
    return f" ({', '.join(jobs)})" if jobs else ""


def _ranks(missing: Sequence[int], places: Sequence[Place], world: int) -> str:
    """`ranks 8, 9 of 16 (n2)`, with the nodes that should run them where the launcher has told all nodes' names."""
    shown = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:16]))}{' and more' * (len(missing) > 16)}"
    shown += f" of {world}"
    names = os.environ.get("GRPO_DS_NODES", "").split()
    if places and names:
        each = places[0].local_world
        shown += f" ({', '.join(dict.fromkeys(names[r // each] for r in missing if r // each < len(names)))})"
    return shown
