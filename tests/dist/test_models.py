"""Reference, publication, export, checkpoints and whole-batch estimators on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import cases, oracle
from tests.dist.harness import RankFailed, launch
from tests.dist.workers import ESTIMATORS, estimator_batch, run_estimator

# The first test of a world size waits for its launch.
pytestmark = pytest.mark.timeout(600)


def _equal(found: dict[str, Tensor], truth: dict[str, Tensor]) -> bool:
    """Same names, shapes, dtypes and bits."""
    return found.keys() == truth.keys() and all(
        found[k].dtype == truth[k].dtype
        and found[k].shape == truth[k].shape
        and torch.equal(found[k].contiguous().view(torch.uint8), truth[k].contiguous().view(torch.uint8))
        for k in truth
    )


# ---- reference ----


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("config", ["zero_inference.json", "partitioned", "zero_inference_offload.json"])
@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_the_reference_gives_the_log_probabilities_of_plain_transformers(
    ranks: list[Any], config: str, layout: str, folder: Path, samples: list[dict[str, Tensor]]
) -> None:
    model = cases.read_model(folder / "untied", torch.float32)
    found = {i: lp for rank in ranks for i, lp in rank["reference"][f"{config}/{layout}"].items()}
    assert sorted(found) == list(range(len(samples)))
    with torch.no_grad():
        truth = torch.cat([oracle.logprobs(model, raw) for raw in samples])
    gap = float((torch.cat([found[i] for i in range(len(samples))]) - truth).abs().max())
    print("largest gap", gap)
    assert gap <= 1e-5


# ---- estimators ----


@pytest.mark.parametrize("split", ["even", "all_on_the_last"])
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_whole_batch_estimators_do_not_see_how_groups_are_split_over_ranks(
    ranks: list[Any], name: str, split: str
) -> None:
    batch = estimator_batch()
    whole = run_estimator(name, batch, None)
    parts = [rank["estimators"][f"{name}/{split}"] for rank in ranks]
    assert sorted(i for part in parts for i in part["rows"].tolist()) == list(range(len(whole)))
    for part in parts:
        torch.testing.assert_close(part["advantages"], whole[part["rows"]], rtol=0, atol=1e-6)
    if len(ranks) > 1:
        assert len(parts[0]["rows"]) == 0 or split == "even"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_whole_batch_estimator_without_the_other_ranks_is_wrong(name: str) -> None:
    batch = estimator_batch()
    whole = run_estimator(name, batch, None)
    rows = (batch["groups"] == 4).nonzero().squeeze(1)
    alone = run_estimator(name, {key: value[rows] for key, value in batch.items()}, None)
    assert float((alone - whole[rows]).abs().max()) > 1e-2


# ---- publication ----

TWO = ["untied/partitioned/float32", "tied/partitioned/float32", "untied/zero3.json/bfloat16", "untied/stage2/float32"]
SYNC = [(world, name) for world, names in ((1, TWO[:2]), (2, TWO), (4, TWO[:2])) for name in names]


def _leads(ranks: list[Any]) -> list[Any]:
    """The ranks with an engine: the four are two nodes of two."""
    return ranks[::2] if len(ranks) == 4 else ranks[:1]


@pytest.mark.parametrize(("ranks", "variant"), SYNC, indirect=["ranks"])
def test_every_engine_holds_the_policys_weights_bit_for_bit(ranks: list[Any], variant: str, folder: Path) -> None:
    model, _, dtype = variant.split("/")
    start = dict(cases.read_model(folder / model, getattr(torch, dtype)).named_parameters())
    for rank in _leads(ranks):
        result = rank["sync"][variant]
        assert _equal(result["first"], {k: v.detach() for k, v in start.items()})
        assert _equal(result["second"], result["held"])
        assert not _equal(result["second"], result["first"]), "the optimizer step must show in the second publication"
        assert sorted(result["names"]) == sorted(start), "each tied weight is sent once"
        assert result["calls"] == 3 * ["pause", "begin", "finish", "flush", "resume"]


@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_small_buckets_are_many_and_large_ones_few(ranks: list[Any]) -> None:
    assert ranks[0]["sync"]["untied/partitioned/float32"]["buckets"] > 8
    assert ranks[0]["sync"]["tied/partitioned/float32"]["buckets"] == 1


@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_an_engine_that_fails_in_a_bucket_is_named_on_every_rank(ranks: list[Any]) -> None:
    messages = {rank["sync"]["broken engine"] for rank in ranks}
    assert len(messages) == 1
    assert "policy version 5" in messages.copy().pop()
    assert "step `bucket 2`: RuntimeError: out of memory in the engine" in messages.pop()


# ---- export ----

EXPORTS = [(2, "untied-float32", 1), (2, "untied-bfloat16", 12), (2, "tied-float32", 6), (1, "tied-float32", 6)]


@pytest.mark.parametrize(("ranks", "kind", "files"), [*EXPORTS, (4, "tied-float32", 6)], indirect=["ranks"])
def test_an_exported_folder_loads_in_transformers_with_the_policys_exact_weights(
    ranks: list[Any], kind: str, files: int, folder: Path
) -> None:
    model, dtype = kind.split("-")
    name = f"export-{len(ranks)}-{kind}"
    loaded = cases.read_model(folder / name, getattr(torch, dtype))
    found = {k: v.detach() for k, v in loaded.named_parameters()}
    assert _equal(found, ranks[-1]["export"][name])
    assert loaded.config.tie_word_embeddings is (model == "tied")
    start = cases.read_model(folder / model, getattr(torch, dtype)).state_dict()
    assert not torch.equal(found["model.norm.weight"], start["model.norm.weight"]), "trained weights, not the start"
    count = len(list((folder / name).glob("*.safetensors")))
    assert count == 1 if files == 1 else count >= files
    assert (folder / name / "tokenizer-saved").exists() and (folder / name / "generation_config.json").exists()
    assert not (folder / f"{name}.partial").exists()


# ---- checkpoints ----


def test_new_processes_that_load_a_checkpoint_go_on_bit_for_bit(world_2: list[Any], resumed: list[Any]) -> None:
    saved = [rank["checkpoint"] for rank in world_2]
    for before, after in zip(saved, resumed, strict=True):
        assert not _equal(after["fresh"], before["at_save"]), "the fresh model must differ for loading to be seen"
        assert _equal(after["loaded"], before["at_save"])
        assert after["losses"] == before["losses"]
        assert len(after["losses"]) > 4
        assert _equal(after["weights"], before["weights"])
        assert not _equal(after["weights"], before["at_save"])


# ---- the harness itself ----


def test_a_failing_rank_ends_the_launch_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="has no attribute 'no_such_worker'"):
        launch("tests.dist.dist_workers:no_such_worker", 2, tmp_path, timeout_s=120)
