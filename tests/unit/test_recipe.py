"""Recipe file + command line: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grpo_ds.config import Recipe, RecipeError
from grpo_ds.recipe import dump_recipe, read_recipe, recipe_keys, resolve_path

MINIMAL = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "reward": {"functions": ["f"]}}


def written(tmp_path: Path, tree: object) -> list[str]:
    path = tmp_path / "mine.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return ["--recipe", str(path)]


def refusal(argv: list[str]) -> str:
    with pytest.raises(RecipeError) as error:
        read_recipe(argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_file_is_read_and_options_after_it_win(tmp_path: Path) -> None:
    argv = written(tmp_path, MINIMAL | {"actor": {"lr": 2.0e-4, "clip_ratio_high": 0.28}, "train": {"rounds": 7}})
    recipe, bases = read_recipe([*argv, "--train.rounds", "9", "--data.max_prompt_tokens=64"])
    assert (recipe.actor.lr, recipe.train.rounds, recipe.data.max_prompt_tokens) == (2.0e-4, 9, 64)
    assert recipe.actor.clip_bounds == (0.2, 0.28)
    assert bases == [Path.cwd(), tmp_path.resolve()]


def test_a_recipe_survives_being_written_out_and_read_again(tmp_path: Path) -> None:
    tree = MINIMAL | {"actor": {"betas": [0.8, 0.99]}, "engine": {"args": {"max_num_seqs": 4}}, "rollout": {"n": 3}}
    recipe, _ = read_recipe(written(tmp_path, tree))
    again, _ = read_recipe(written(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert again.actor.betas == (0.8, 0.99)


def test_the_launchers_local_rank_is_no_setting(tmp_path: Path) -> None:
    plain, _ = read_recipe(written(tmp_path, MINIMAL))
    assert read_recipe(["--local_rank=1", *written(tmp_path, MINIMAL)])[0] == plain


def test_an_unknown_key_is_answered_with_the_nearest_known_one(tmp_path: Path) -> None:
    in_file = refusal(written(tmp_path, MINIMAL | {"actor": {"learning_rate": 1}}))
    assert "mine.yaml: unknown key `actor.learning_rate`" in in_file
    misspelt = refusal([*written(tmp_path, MINIMAL), "--actor.clip_ratio_hgih", "0.3"])
    assert misspelt == "command line: unknown key `actor.clip_ratio_hgih`; did you mean `actor.clip_ratio_high`?"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (MINIMAL | {"actor": 5}, ["`actor` is a section", "got 5"]),
        ("- a\n- b\n", ["a recipe is a mapping of sections", "got list"]),
        ("model: [", ["mine.yaml: not valid YAML"]),
        (MINIMAL | {"train": {"rounds": "many"}}, ["`train.rounds`", "got `many`"]),
        (MINIMAL | {"actor": {"loss_agg_mode": "mean"}}, ["`actor.loss_agg_mode`", "token-mean"]),
        (
            MINIMAL | {"rollout": {"temperature": 0}},
            ["rollout.temperature must be positive: training needs"],
        ),
        (MINIMAL | {"rollout": {"n": 1}}, ["filter_groups.enable needs rollout.n >= 2"]),
        (MINIMAL | {"rollout": {"top_p": 0.9}}, ["rollout.top_p and rollout.top_k must be off while"]),
        (MINIMAL | {"train": {"micro_batch_tokens": 100}}, ["train.micro_batch_tokens (100) is below", "(3072)"]),
        ({"model": {"path": "m"}}, ["data.train"]),
        (
            MINIMAL | {"engine": {"urls": ["http://h:1"], "replicas": 2}},
            ["engine.replicas counts servers that the run"],
        ),
        (MINIMAL | {"engine": {"urls": ["http://h:1"], "sleep": True}}, ["engine.sleep is for servers that share"]),
    ],
)
def test_mistakes_are_refused_in_one_sentence_that_names_the_key_and_the_file(
    tmp_path: Path, tree: object, words: list[str]
) -> None:
    message = refusal(written(tmp_path, tree))
    for word in ["mine.yaml", *words]:
        assert word in message


def test_a_recipe_that_does_not_exist_is_refused_with_those_that_do() -> None:
    assert "--recipe nosuch: no such file, and recipes/ has only: " in refusal(["--recipe", "nosuch"])
    assert "quickstart.yaml" in refusal(["--recipe=nosuch"])


def test_every_key_has_a_dotted_name_and_sections_are_among_them() -> None:
    keys = recipe_keys()
    assert {"actor", "actor.lr", "algorithm.filter_groups.tolerance", "resume"} <= set(keys)
    assert set(keys) >= set(Recipe.__dataclass_fields__)


def test_paths_are_looked_for_in_each_base_in_turn(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model").mkdir()
    assert resolve_path("model", [tmp_path, tmp_path / "a"]) == (tmp_path / "a" / "model").resolve()
    assert resolve_path("org/name", [tmp_path]) is None
