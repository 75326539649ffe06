"""What a rank knows of itself before it meets the others, and DeepSpeed's configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_ds.actor.ds_json import OWNED_BY_RECIPE, actor_config, load_ds_json, reference_config, zero_stage
from grpo_ds.config import RecipeError
from grpo_ds.dist import DistError, Ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def ranks_with(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Ranks:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Ranks(5.0)


def test_without_a_launcher_there_is_one_rank_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_with(monkeypatch)
    assert (ranks.rank, ranks.world, ranks.node, ranks.nodes) == (0, 1, 0, 1)
    assert ranks.is_main
    assert ranks.leads_node


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_nodes_follow_from_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ranks = ranks_with(monkeypatch, RANK="9", WORLD_SIZE="16", LOCAL_RANK="1", **{name: "8"})
    assert (ranks.node, ranks.nodes, ranks.is_main, ranks.leads_node) == (1, 2, False, False)
    lead = ranks_with(monkeypatch, RANK="8", WORLD_SIZE="16", LOCAL_RANK="0", **{name: "8"})
    assert lead.leads_node
    assert not lead.is_main


def test_one_rank_exchanges_with_itself_and_has_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_with(monkeypatch)
    assert ranks.exchange([b"abc"], "test") == [b"abc"]
    assert ranks.column == [0]


def test_a_first_node_without_a_name_that_leads_anywhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_with(monkeypatch, RANK="8", WORLD_SIZE="16", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(DistError, match=r"rank 8 on .* finds no address .* MASTER_ADDR no-such-host.invalid: "):
        ranks._meet()


@pytest.mark.parametrize(
    "name", ["zero3.json", "zero3_offload.json", "zero_inference.json", "zero_inference_offload.json"]
)
def test_the_shipped_files_are_stage_3_and_leave_the_recipes_numbers_alone(name: str) -> None:
    config = load_ds_json(name, [], "actor.deepspeed")
    assert zero_stage(config) == 3
    assert not set(config) & set(OWNED_BY_RECIPE)


@pytest.mark.parametrize("key", OWNED_BY_RECIPE)
def test_what_the_recipe_owns_is_refused_with_the_recipes_key(tmp_path: Path, key: str) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({key: 1}))
    with pytest.raises(RecipeError, match=f"mine.json: remove `{key}`: it is set by the recipe"):
        load_ds_json("mine.json", [tmp_path], "actor.deepspeed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is a JSON object, got list"),
        ("{}", "`zero_optimization.stage` is 0: choose 1, 2 or 3"),
        (None, "actor.deepspeed: no file `mine.json`.*zero3"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_ds_json("mine.json", [tmp_path], "actor.deepspeed")


def test_the_recipe_fills_in_precision_clipping_and_manual_accumulation() -> None:
    config = actor_config({"zero_optimization": {"stage": 3}}, dtype="bfloat16", grad_clip=0.5, world=4)
    assert config["train_batch_size"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["managed_gradient_accumulation"] is False
    assert reference_config({"zero_optimization": {"stage": 3}}, dtype="float32", world=2)["bf16"] == {"enabled": False}


def test_a_reference_that_nothing_partitions_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"needs zero_optimization.stage 3, got 2"):
        reference_config({"zero_optimization": {"stage": 2}}, dtype="float32", world=2)
