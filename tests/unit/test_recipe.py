"""Recipe file + command line: what is read, what is refused, and in which words."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ds.config import Recipe, RecipeError
from grpo_ds.recipe import dump_recipe, read_recipe, recipe_keys, resolve_path

MINIMAL = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "reward": {"functions": ["f"]}}


def importance(**keys: object) -> dict[str, object]:
    return {"algorithm": {"importance": keys}}


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
            yaml.safe_dump(MINIMAL) + "actor: {lr: 1.0}\ntrain: {}\nactor:\n  clip_ratio: 0.1\n",
            ["`actor` stands twice in one section, in lines 8 and 10"],
        ),
        ("model: {path: a, path: b}\n", ["`path` stands twice in one section, in lines 1 and 1"]),
        (MINIMAL | importance(lower=1.5, upper=1.0), ["importance.lower is 1.5 and", "0 <= lower <= upper"]),
        (MINIMAL | importance(lower=-1.0), ["algorithm.importance.lower is -1.0"]),
        (MINIMAL | importance(lower=0.0, upper=0.0), ["algorithm.importance.upper is 0.0", "upper above 0"]),
        (MINIMAL | importance(reject_lower=3.0), ["importance.reject_lower is 3.0 and", "reject_upper is 2.0"]),
        (MINIMAL | {"rollout": {"top_k": 5}} | importance(level="off", reject="token"), ["importance.reject: off"]),
        (MINIMAL | {"sync": {"timeout_s": 0}}, ["sync.timeout_s is 0.0, it must be positive"]),
        (MINIMAL | {"sync": {"bucket_mb": -1}}, ["sync.bucket_mb must not be negative"]),
        (MINIMAL | {"engine": {"start_timeout_s": 0}}, ["engine.start_timeout_s is 0.0"]),
        (MINIMAL | {"engine": {"request_timeout_s": -5}}, ["engine.request_timeout_s is -5.0"]),
        (MINIMAL | {"engine": {"stall_timeout_s": ".nan"}}, ["engine.stall_timeout_s"]),
        (MINIMAL | {"train": {"heldout_temperature": 0, "heldout_n": 2}}, ["set train.heldout_n: 1"]),
        (MINIMAL | {"train": {"heldout_top_p": 0}}, ["train.heldout_top_p must lie in (0, 1]"]),
        (
            MINIMAL | {"train": {"prompts_per_round": 9}, "rollout": {"prompts_per_batch": 2}},
            ["rollout.prompts_per_batch (2) x", "gives 8 groups at most", "train.prompts_per_round (9)"],
        ),
        (
            MINIMAL | {"engine": {"urls": ["http://h:1"], "replicas": 2}},
            ["engine.replicas counts servers that the run"],
        ),
        (MINIMAL | {"engine": {"urls": ["http://h:1"], "sleep": True}}, ["engine.sleep is for servers that share"]),
        (
            MINIMAL | {"engine": {"max_restarts": 1}, "sync": {"timeout_s": 300}},
            [
                "sync.timeout_s (300) does not exceed engine.stall_timeout_s (300)",
                "raise the first or lower the second",
            ],
        ),
    ],
)
def test_mistakes_are_refused_in_one_sentence_that_names_the_key_and_the_file(
    tmp_path: Path, tree: object, words: list[str]
) -> None:
    message = refusal(written(tmp_path, tree))
    for word in ["mine.yaml", *words]:
        assert word in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("reward.overlong_penalty_factor", -1.0, "is -1.0, it must be a finite number from 0 up (0: no penalty)"),
        ("reward.overlong_penalty_factor", math.inf, "is inf, it must be a finite number"),
        ("reward.dry_run_rows", -1, "is -1, it must be a finite number from 0 up"),
        ("reward.weights", [math.nan], "is [nan]: give finite weights"),
        ("reward.weights", [0.0], "is [0.0]: give finite weights, and one of them other than 0"),
        ("data.max_prompt_tokens", 0, "is 0, it must be positive"),
        ("rollout.top_k", -1, "is -1, it must be a finite number from 0 up (0: off)"),
        ("rollout.temperature", math.inf, "must be positive"),
        ("actor.lr", math.inf, "is inf, it must be a finite number from 0 up"),
        ("actor.lr_warmup_steps", -1, "is -1, it must be a finite number from 0 up (0: no warm-up)"),
        ("actor.weight_decay", -0.1, "is -0.1, it must be a finite number from 0 up"),
        ("actor.kl_loss_coef", math.nan, "is nan, it must be a finite number from 0 up"),
        ("actor.grad_clip", -1.0, "is -1.0, it must be a finite number from 0 up (0: no clipping)"),
        ("actor.betas", [0.9, 1.0], "is [0.9, 1.0], both must lie in [0, 1)"),
        ("actor.betas", [-0.1, 0.9], "is [-0.1, 0.9], both must lie in [0, 1)"),
        ("actor.adam_eps", 0.0, "is 0.0, it must be positive"),
        ("actor.logprob_chunk_tokens", 0, "is 0, it must be positive"),
        ("train.checkpoint_every", -1, "is -1, it must be a finite number from 0 up (0: never, but at the end)"),
        ("train.evaluate_every", -1, "is -1, it must be a finite number from 0 up (0: never, but before and after)"),
        ("run.rollouts_per_round", -1, "is -1, it must be a finite number from 0 up (0: none)"),
        ("model.lora.alpha", math.nan, "must be positive"),
    ],
)
def test_numbers_that_would_mean_something_else_are_refused(
    tmp_path: Path, key: str, value: object, words: str
) -> None:
    """-1 is how others say `off`: as a warm-up it would make the learning rate negative, as an interval every round."""
    tree: dict[str, Any] = copy.deepcopy(MINIMAL)
    *sections, name = key.split(".")
    section = tree
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    assert f"{key} {words}" in refusal(written(tmp_path, tree))


def test_yaml_merge_keys_may_be_overridden(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + "actor: &base {lr: 1.0}\n"
    recipe, _ = read_recipe(
        written(tmp_path, text.replace("&base {lr: 1.0}", "{<<: {lr: 1.0, adam_eps: 0.5}, lr: 2.0}"))
    )
    assert (recipe.actor.lr, recipe.actor.adam_eps) == (2.0, 0.5)


def test_batches_without_limit_may_be_smaller_than_a_round(tmp_path: Path) -> None:
    small = {"train": {"prompts_per_round": 9}, "rollout": {"prompts_per_batch": 2}}
    endless = {"algorithm": {"filter_groups": {"max_num_gen_batches": 0}}}
    assert read_recipe(written(tmp_path, MINIMAL | small | endless))[0].prompts_per_batch == 2


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
