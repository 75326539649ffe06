"""Every recipe of recipes/ is read and checked as far as that goes without weights, data and a GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from grpo_ds.actor.ds_json import load_ds_json, reference_config, zero_stage
from grpo_ds.build import build_estimator, build_filter, build_policy_loss, check_heldout_metric
from grpo_ds.config import Recipe, RecipeError
from grpo_ds.engine.devices import ranks_of
from grpo_ds.estimators.group import DrGrpo, Grpo
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
    check_heldout_metric(recipe)
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
    assert all(word in head for word in ("Size: ", "Hardware: ", "Data: ", "Expected: "))
    if not read(name).model.path.startswith("demo/"):
        assert "Expected: not run here" in head
        return
    with safe_open(RECIPES / "demo/model/model.safetensors", "pt") as file:
        count = sum(math.prod(file.get_slice(key).get_shape()) for key in list(file.keys()))
    assert f"Size: {count / 1e6:.2f}M parameters" in head


@pytest.mark.parametrize("name", NAMES)
def test_the_attention_kernel_of_a_recipe_is_in_the_environment_that_setup_makes(name: str) -> None:
    lock = (RECIPES.parent / "launch/constraints-cuda.txt").read_text().splitlines()
    have = {line.partition("==")[0] for line in lock}
    assert {"torch", "vllm"} <= have
    brings = {"sdpa": {"torch"}, "eager": {"torch"}, "flash_attention_2": {"flash-attn", "flash_attn", "kernels"}}
    assert brings[read(name).model.attn_implementation] & have


@pytest.mark.parametrize("name", ["dapo_qwen", "dapo_qwen_1gpu"])
def test_the_held_out_table_of_dapo_shows_accuracy_and_not_the_weighted_score(name: str) -> None:
    recipe = read(name)
    assert recipe.reward.weights == [2.0] and recipe.reward.overlong_penalty_factor == 1.0
    assert recipe.train.heldout_metric == recipe.reward.functions[0]


def test_every_gpu_of_the_gsm8k_recipe_generates() -> None:
    recipe = read("grpo_gsm8k_qwen")
    head = (RECIPES / "grpo_gsm8k_qwen.yaml").read_text()
    assert f"one node of {recipe.engine.replicas * ranks_of(recipe.engine)} GPUs" in head


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
    assert (t.heldout_n, t.heldout_temperature, t.heldout_top_p) == (1, 1.0, 0.7)
    assert t.collective_timeout_s > r.engine.request_timeout_s > 7200
    assert build_estimator(r)[0] == Grpo(norm_by_std=True)


def test_the_one_gpu_recipe_keeps_what_makes_it_dapo() -> None:
    large, small = read("dapo_qwen"), read("dapo_qwen_1gpu")
    assert build_policy_loss(small) == build_policy_loss(large)
    assert small.actor.loss_agg_mode == large.actor.loss_agg_mode and small.actor.kl_loss_coef == 0
    assert small.algorithm.filter_groups.enable and small.reward.overlong_buffer_len > 0
    assert small.train.prompts_per_update == 32 and small.prompts_per_batch > small.train.prompts_per_round


@pytest.mark.parametrize("name", NAMES)
def test_the_fragment_that_users_know_is_valid_in_any_recipe_and_each_value_counts(name: str, tmp_path: Path) -> None:
    tree = merged(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), yaml.safe_load(FRAGMENT))
    path = tmp_path / "merged.yaml"
    path.write_text(yaml.safe_dump(tree))
    recipe = read(str(path))
    assert build_estimator(recipe)[0] == Grpo(norm_by_std=True)
    loss, actor = build_policy_loss(recipe), tree["actor"]
    # What the recipe says beside the fragment overrides clip_ratio, as it does for users of the field.
    low, high = actor.get("clip_ratio_low", 0.2), actor.get("clip_ratio_high", 0.2)
    dual = actor.get("policy_loss_args", {}).get("dual_clip")
    assert loss == Vanilla(clip_ratio_low=low, clip_ratio_high=high, dual_clip=dual)
    assert recipe.actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert recipe.algorithm.gamma == 1.0


def test_the_fragment_alone_sets_both_bounds_and_another_value_of_it_changes_them() -> None:
    for value in (0.2, 0.1):
        loss = build_policy_loss(read_recipe(["--recipe", "dr_grpo", f"--actor.clip_ratio={value}"])[0])
        assert loss == Vanilla(clip_ratio_low=value, clip_ratio_high=value)


@pytest.mark.parametrize(
    ("option", "check"),
    [
        ("--algorithm.norm_adv_by_std_in_grpo=false", lambda r: build_estimator(r)[0].norm_by_std is False),
        ("--actor.clip_ratio_high=0.3", lambda r: build_policy_loss(r).clip_ratio_high == 0.3),
        ("--actor.clip_ratio_low=0.1", lambda r: build_policy_loss(r).clip_ratio_low == 0.1),
        ("--actor.policy_loss_fn=gspo", lambda r: type(build_policy_loss(r)).__name__ == "Gspo"),
    ],
)
def test_each_key_changes_what_is_built(option: str, check: Any) -> None:
    assert check(read_recipe(["--recipe", "quickstart", option])[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        # quickstart sets both bounds, dr_grpo none of them.
        (
            ["quickstart", "--actor.clip_ratio=0.1"],
            r"actor\.clip_ratio is 0\.1, which changes nothing: .*'vanilla'.*both are",
        ),
        (
            ["dr_grpo", "--actor.policy_loss_fn=gpg", "--actor.clip_ratio=0.1"],
            r"clip_ratio is 0\.1.*'gpg'.*takes no clip",
        ),
        (
            ["quickstart", "--actor.policy_loss_fn=reinforce"],
            r"clip_ratio_low is 0\.2, but .*'reinforce'.*does not take it",
        ),
        (
            ["quickstart", "--actor.policy_loss_args.clip_ratio_high=0.5"],
            r"actor\.clip_ratio_high is 0\.28 but actor\.policy_loss_args\.clip_ratio_high is 0\.5: remove one",
        ),
        (
            [
                "dr_grpo",
                "--actor.policy_loss_args={clip_ratio_high: 0.5, clip_ratio_low: 0.5}",
                "--actor.clip_ratio=0.1",
            ],
            r"actor\.clip_ratio is 0\.1, which changes nothing",
        ),
        (["quickstart", "--algorithm.gamma=0.9"], r"algorithm\.gamma is 0\.9, but estimator 'grpo'.*does not know it"),
        (
            ["rloo", "--algorithm.norm_adv_by_std_in_grpo=false"],
            r"norm_adv_by_std_in_grpo is False, but estimator 'rloo'",
        ),
        (
            ["rloo", "--train.heldout_metric=accuracy"],
            "train.heldout_metric is 'accuracy': choose one of score, arithmetic",
        ),
    ],
)
def test_a_value_that_could_not_take_effect_is_refused_with_the_reason(options: list[str], reason: str) -> None:
    recipe = read_recipe(["--recipe", *options])[0]
    with pytest.raises(RecipeError, match=reason):
        build_estimator(recipe)
        build_policy_loss(recipe)
        build_filter(recipe)
        check_heldout_metric(recipe)


def test_what_takes_effect_in_part_or_says_what_is_so_anyway_is_allowed() -> None:
    half = ["--actor.clip_ratio=0.1", "--actor.policy_loss_args.clip_ratio_high=0.5"]
    assert build_policy_loss(read_recipe(["--recipe", "dr_grpo", *half])[0]) == Vanilla(
        clip_ratio_low=0.1, clip_ratio_high=0.5
    )
    same = ["--recipe", "quickstart", "--actor.policy_loss_args.clip_ratio_high=0.28"]
    assert build_policy_loss(read_recipe(same)[0]).clip_ratio_high == 0.28
    plain = ["--algorithm.adv_estimator=dr_grpo", "--algorithm.norm_adv_by_std_in_grpo=false"]
    assert build_estimator(read_recipe(["--recipe", "quickstart", *plain])[0])[0] == DrGrpo()


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
