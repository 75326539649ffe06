"""The whole product: every loss x aggregation x KL placement under every cut, on 1, 2 and 4 ranks; about 15 minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import cases, oracle
from tests.dist.harness import launch

TOLERANCE = 1e-5
LAUNCH_S = 1500.0
"""Deadline of a launch; on 2 cores 1 rank takes 3 to 4 minutes, 4 ranks take 6."""


@pytest.mark.slow
@pytest.mark.timeout(LAUNCH_S + 300)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_no_cut_changes_any_gradient(
    world: int, folder: Path, truth: oracle.Truth, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against autograd in one process, in float64 and in float32; 4 ranks are two nodes of two."""
    product = cases.product_cases()
    assert (
        len({case.name for case in product}) == len(product) == len({case.truth for case in product}) * len(cases.CUTS)
    )
    ranks = launch("tests.dist.workers:all_gradients", world, folder, local_world=min(world, 2), timeout_s=LAUNCH_S)
    single = oracle.Truth(folder, torch.float32)
    errors = {}
    for case in product:
        found = ranks[0][case.name]
        for kind, wanted in (("float64", truth), ("float32", single)):
            errors[case.name, kind] = oracle.error_of(found["gradients"], wanted(case))
        norms = [float(torch.cat([g.flatten() for g in step.values()]).norm()) for step in truth(case)]
        assert all(rank[case.name]["norms"] == pytest.approx(norms, rel=TOLERANCE) for rank in ranks), case.name
    count = sum(len(found["gradients"]) for found in ranks[0].values())
    worst = {kind: max(e for (_, k), e in errors.items() if k == kind) for kind in ("float64", "float32")}
    with capsys.disabled():
        print(
            f"\nfull product on {world} rank(s): {count} gradients of {len(product)} cases, worst relative error "
            f"{worst['float64']:.2g} against float64, {worst['float32']:.2g} against float32"
        )
    assert {key: error for key, error in errors.items() if not error <= TOLERANCE} == {}
