"""Every recipe of recipes/ is read and checked as far as that goes without weights, data and a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ds.actor.ds_json import load_ds_json, reference_config, zero_stage
from grpo_ds.build import build_estimator, build_filter, build_policy_loss
from grpo_ds.config import Recipe, RecipeError
from grpo_ds.estimators.group import Grpo
from grpo_ds.losses.policy import Vanilla
from grpo_ds.recipe import RECIPES, dump_recipe, read_recipe
from grpo_ds.rewards.resolve import resolve

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# As users of the field write it.
FRAGMENT = """
algorithm: {adv_estimator: grpo, norm_adv_by_std_in_grpo: true, gamma: 1.0}
actor: {clip_ratio: 0.2, loss_agg_mode: seq-mean-token-sum-norm, policy_loss_fn: vanilla}
"""


def read(name: str) -> Recipe:
    return read_recipe(["--recipe", name])[0]


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Sections of `extra` over those of `base`, key by key."""
    return base | {section: {**base.get(section, {}), **keys} for section, keys in extra.items()}


def test_the_recipes_that_are_promised_are_there() -> None:
    small = {"quickstart", "dr_grpo", "rloo", "reinforce_pp", "remax", "gspo"}
    assert set(NAMES) >= small | {"dapo_qwen", "dapo_qwen_1gpu", "grpo_gsm8k_qwen"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves_and_every_part_it_names_is_built(name: str, tmp_path: Path) -> None:
    recipe, bases = read_recipe(["--recipe", name])
    assert recipe.run.name == name
    estimator, _ = build_estimator(recipe)
    assert callable(estimator) and callable(build_policy_loss(recipe)) and callable(build_filter(recipe))
    assert all(callable(resolve(function, bases)) for function in recipe.reward.functions)
    assert zero_stage(load_ds_json(recipe.actor.deepspeed, bases, "actor.deepspeed")) == 3
    frozen = load_ds_json(recipe.reference.deepspeed, bases, "reference.deepspeed")
    assert reference_config(frozen, dtype="float32", world=1)["zero_optimization"]["stage"] == 3
    copy = tmp_path / "resolved.yaml"
    copy.write_text(dump_recipe(recipe))
    assert read(str(copy)) == recipe, "what is written into the run's folder is the same recipe"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_headed_by_size_hardware_data_and_what_to_expect(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert all(word in head for word in ("Size: ", "Hardware: ", "Expected: "))
    if not read(name).model.path.startswith("demo/"):
        assert "Expected: not run here" in head and "Data: " in head


def test_dapo_has_the_published_settings() -> None:
    r = read("dapo_qwen")
    t, f, a = r.train, r.algorithm.filter_groups, r.actor
    assert (t.prompts_per_round, r.rollout.n, t.prompts_per_update, r.prompts_per_batch) == (512, 16, 32, 1536)
    assert (r.data.max_prompt_tokens, r.rollout.max_response_tokens) == (2048, 20480)
    assert (r.reward.overlong_buffer_len, r.reward.overlong_penalty_factor) == (4096, 1.0)
    assert (a.lr, a.lr_warmup_steps, a.weight_decay, a.grad_clip) == (1e-6, 10, 0.1, 1.0)
    assert build_policy_loss(r) == Vanilla(clip_ratio_low=0.2, clip_ratio_high=0.28, dual_clip=10.0)
    assert (a.kl_loss_coef, a.loss_agg_mode, r.rollout.temperature) == (0.0, "token-mean", 1.0)
    assert (f.enable, f.metric_to_filter, f.max_num_gen_batches) == (True, "score", 10)
    assert build_estimator(r)[0] == Grpo(norm_by_std=True)


def test_the_one_gpu_recipe_keeps_what_makes_it_dapo() -> None:
    large, small = read("dapo_qwen"), read("dapo_qwen_1gpu")
    assert build_policy_loss(small) == build_policy_loss(large)
    assert small.actor.loss_agg_mode == large.actor.loss_agg_mode and small.actor.kl_loss_coef == 0
    assert small.algorithm.filter_groups.enable and small.reward.overlong_buffer_len > 0
    assert small.train.prompts_per_update == 32 and small.prompts_per_batch > small.train.prompts_per_round


@pytest.mark.parametrize("name", NAMES)
def test_the_fragment_that_users_know_is_valid_in_any_recipe_and_each_value_counts(name: str, tmp_path: Path) -> None:
    file = RECIPES / f"{name}.yaml"
    tree = merged(yaml.safe_load(file.read_text()), yaml.safe_load(FRAGMENT))
    tree["actor"] = {k: v for k, v in tree["actor"].items() if k not in ("clip_ratio_low", "clip_ratio_high")}
    tree["actor"].pop("policy_loss_args", None)
    path = tmp_path / "merged.yaml"
    path.write_text(yaml.safe_dump(tree))
    recipe = read(str(path))
    assert build_estimator(recipe)[0] == Grpo(norm_by_std=True)
    assert build_policy_loss(recipe) == Vanilla(clip_ratio_low=0.2, clip_ratio_high=0.2)
    assert recipe.actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert recipe.algorithm.gamma == 1.0


@pytest.mark.parametrize(
    ("option", "check"),
    [
        ("--algorithm.norm_adv_by_std_in_grpo=false", lambda r: build_estimator(r)[0].norm_by_std is False),
        ("--actor.clip_ratio=0.1", lambda r: build_policy_loss(r).clip_ratio_high == 0.28),
        ("--actor.clip_ratio_high=0.3", lambda r: build_policy_loss(r).clip_ratio_high == 0.3),
        ("--actor.policy_loss_fn=gspo", lambda r: type(build_policy_loss(r)).__name__ == "Gspo"),
    ],
)
def test_each_key_changes_what_is_built(option: str, check: Any) -> None:
    assert check(read_recipe(["--recipe", "quickstart", option])[0])


def test_gamma_reaches_the_estimator_that_knows_it() -> None:
    recipe = read_recipe(["--recipe", "reinforce_pp", "--algorithm.gamma=0.9"])[0]
    assert build_estimator(recipe)[0].gamma == 0.9


def test_an_option_that_a_recipe_misspells_is_refused_before_anything_loads() -> None:
    recipe = read_recipe(["--recipe", "dapo_qwen", "--actor.policy_loss_args.dual_clap=3.0"])[0]
    with pytest.raises(RecipeError, match="no option 'dual_clap', did you mean 'dual_clip'"):
        build_policy_loss(recipe)


GDPO = ["--recipe", "quickstart", "--algorithm.adv_estimator", "gdpo"]
OVERLONG = ["--reward.overlong_buffer_len", "4"]
KL_IN_REWARD = ["--actor.kl_placement", "reward", "--actor.kl_loss_coef", "0.1"]


@pytest.mark.parametrize(
    ("shaping", "way_out"),
    [
        (OVERLONG, r"set reward.overlong_buffer_len \(4\) to 0, or make the penalty one of reward.functions"),
        (KL_IN_REWARD, r"set actor.kl_placement \(reward\) to loss"),
    ],
)
def test_shaping_is_refused_where_the_estimator_would_not_see_it(shaping: list[str], way_out: str) -> None:
    with pytest.raises(RecipeError, match=f"estimator 'gdpo' from .* shaping it would have no effect: {way_out}"):
        build_estimator(read_recipe([*GDPO, *shaping])[0])
    build_estimator(read_recipe(["--recipe", "quickstart", *shaping])[0])


@pytest.mark.parametrize(
    "without_effect", [[*OVERLONG, "--reward.overlong_penalty_factor", "0"], [*KL_IN_REWARD[:3], "0"], []]
)
def test_shaping_of_size_zero_is_no_shaping(without_effect: list[str]) -> None:
    assert build_estimator(read_recipe([*GDPO, *without_effect])[0])[1]["unshaped_rewards"]


def test_reward_weights_reach_an_estimator_of_single_rewards_and_must_be_one_a_function() -> None:
    two = [*GDPO, "--reward.functions", "[arithmetic, exact_match]"]
    weighted = [*two, "--reward.weights", "[0.5, 2.0]"]
    assert build_estimator(read_recipe(two)[0])[0].weights is None
    assert build_estimator(read_recipe(weighted)[0])[0].weights == [0.5, 2.0]
    own = "--algorithm.estimator_args.weights"
    assert build_estimator(read_recipe([*weighted, own, "[1.0, 3.0]"])[0])[0].weights == [1.0, 3.0]
    with pytest.raises(RecipeError, match="estimator_args.weights has 3 entries for 2 reward.functions"):
        build_estimator(read_recipe([*two, own, "[1.0, 2.0, 3.0]"])[0])


def test_reward_weights_are_not_an_option_weights_of_any_other_estimator(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def own(token_rewards, response_mask, group_index, greedy_rewards=None, *, weights: dict[str, float] = {}):\n"
        "    return token_rewards, token_rewards\n"
    )
    arguments = ["--recipe", "quickstart", "--reward.weights", "[2.0]", "--algorithm.adv_estimator"]
    estimator, _ = build_estimator(read_recipe([*arguments, f"{tmp_path}/own.py:own"])[0])
    assert estimator.keywords == {}
