"""What a rank says it has read is the same on nodes that differ only in where things lie, and differs otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_ds.agreement import terms
from grpo_ds.config import DataConfig, ModelConfig, Recipe, RewardConfig
from grpo_ds.demo import build_tokenizer
from grpo_ds.prompts import PromptStream, load_rows

ROWS = ['{"prompt": "1+1=", "answer": "2"}\n', '{"prompt": "2+2=", "answer": "4"}\n']


def node(folder: Path, rows: list[str] | None = None, rewards: str = "def right(**_): ...\n") -> tuple[Recipe, Path]:
    """A checkout in a folder of its own."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(rows or ROWS))
    (folder / "rewards.py").write_text(rewards)
    data = DataConfig(train=str(folder / "train.jsonl"))
    functions = [f"{folder}/rewards.py:right"]
    return Recipe(model=ModelConfig(path="m"), data=data, reward=RewardConfig(functions=functions)), folder


def said(recipe: Recipe, folder: Path, stage: int = 3, reads_data: bool = True) -> dict[str, str]:
    prompts: Any = None
    if reads_data:
        rows = load_rows("train", recipe.data, [folder])
        prompts = PromptStream(rows, build_tokenizer(), recipe.data, recipe.train.seed)
    return terms(recipe, [folder], {"actor.deepspeed": {"stage": stage}}, prompts, None)


def unlike(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {what for what, _ in one.items() ^ other.items()}


def test_where_a_node_keeps_things_and_names_the_run_makes_no_difference(tmp_path: Path) -> None:
    first, folder = node(tmp_path / "a")
    second, other = node(tmp_path / "b")
    second = replace(
        second,
        engine=replace(second.engine, python="/opt/vllm/bin/python"),
        run=replace(second.run, dir="/scratch/runs", name="run-12:00:01"),
        resume="auto",
    )
    assert said(first, folder) == said(second, other)


@pytest.mark.parametrize(
    ("rows", "rewards", "stage", "what"),
    [
        ([ROWS[0], ROWS[1].replace('"4"', '"5"')], None, 3, "the rows of data.train"),
        ([ROWS[0].replace("1+1", "1+2"), ROWS[1]], None, 3, "the rows of data.train"),
        (ROWS, "def right(**_): return 1\n", 3, "reward.functions"),
        (ROWS, None, 2, "the file of actor.deepspeed"),
    ],
)
def test_an_edit_on_one_node_is_seen(
    rows: list[str], rewards: str | None, stage: int, what: str, tmp_path: Path
) -> None:
    first = said(*node(tmp_path / "a"))
    edited = node(tmp_path / "b", rows) if rewards is None else node(tmp_path / "b", rows, rewards)
    assert unlike(first, said(*edited, stage=stage)) == {what}


def test_every_other_setting_is_named_by_its_key_with_its_value(tmp_path: Path) -> None:
    recipe, folder = node(tmp_path / "a")
    faster = replace(recipe, actor=replace(recipe.actor, lr=2e-6))
    assert unlike(said(recipe, folder), said(faster, folder)) == {"actor.lr"}
    assert said(faster, folder)["actor.lr"] == "2e-06"
    longer = replace(recipe, engine=replace(recipe.engine, args={"x": "y" * 500}))
    assert unlike(said(recipe, folder), said(longer, folder)) == {"engine.args"}
    assert all(len(text) < 200 for text in said(longer, folder).values())


def test_a_rank_that_has_read_no_data_says_nothing_of_it(tmp_path: Path) -> None:
    recipe, folder = node(tmp_path / "a")
    lead, other = said(recipe, folder), said(recipe, folder, reads_data=False)
    assert unlike(lead, other) == {"the rows of data.train", "the rows of data.heldout"}
