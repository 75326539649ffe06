"""Pieces of the start-up that `grpo_ds.train` puts together: each checks its input and speaks in the user's terms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo_ds.actor import backend
from grpo_ds.actor.checkpoint import TrainerState
from grpo_ds.actor.ds_json import offloads_optimizer
from grpo_ds.colocation import Colocation
from grpo_ds.config import ActorConfig, AlgorithmConfig, EngineConfig, ModelConfig, Recipe, RecipeError
from grpo_ds.dist import Ranks
from grpo_ds.engine import make_engine
from grpo_ds.engine.base import GenerationEngine
from grpo_ds.estimators import REGISTRY as ESTIMATORS
from grpo_ds.estimators import estimator_options, get_estimator
from grpo_ds.filters import REGISTRY as FILTERS
from grpo_ds.filters import get_filter
from grpo_ds.lora import find_targets
from grpo_ds.losses import REGISTRY as LOSSES
from grpo_ds.losses import check_kl_name, get_policy_loss
from grpo_ds.plugins import located
from grpo_ds.recipe import resolve_path
from grpo_ds.rewards import function_names
from grpo_ds.samples import AdvantageStage
from grpo_ds.sync.publish import WeightPublisher
from grpo_ds.sync.transport import Transport, choose_transport, urls_of_node


def locate_plugins(recipe: Recipe, bases: list[Path]) -> Recipe:
    """The recipe with plugins of the form `file.py:Name` found in the working directory or beside the recipe."""
    a, f = recipe.algorithm, recipe.algorithm.filter_groups
    filters = replace(f, filter=located(f.filter, bases))
    algorithm = replace(a, adv_estimator=located(a.adv_estimator, bases), filter_groups=filters)
    actor = replace(recipe.actor, policy_loss_fn=located(recipe.actor.policy_loss_fn, bases))
    return replace(recipe, algorithm=algorithm, actor=actor)


def build_estimator(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """The estimator of the recipe and its declared needs; refuses a recipe that does not meet them."""
    a: AlgorithmConfig = recipe.algorithm
    _check_general_keys(a)
    options = estimator_options(a.adv_estimator, a.norm_adv_by_std_in_grpo, a.gamma, a.estimator_args)
    known = {option.name for option in ESTIMATORS.options(a.adv_estimator)}
    if "weights" in known and ESTIMATORS.needs(a.adv_estimator)["per_function_rewards"]:
        _give_weights(recipe, options)
    estimator = get_estimator(a.adv_estimator, **options)
    needs = ESTIMATORS.needs(estimator)
    label = f"algorithm.adv_estimator: {ESTIMATORS.label(a.adv_estimator)}"
    if recipe.rollout.n < int(needs["min_group_size"]):
        raise RecipeError(
            f"{label} compares the responses of a prompt and needs at least {needs['min_group_size']} of them: rollout.n "
            f"is {recipe.rollout.n}"
        )
    shaping = _shaping(recipe)
    if needs["unshaped_rewards"] and shaping:
        raise RecipeError(f"{label} does not look at the summed reward, so shaping it would have no effect: {shaping}")
    return estimator, needs


def _give_weights(recipe: Recipe, options: dict[str, Any]) -> None:
    """Puts reward.weights into the options of an estimator that takes each function's reward, and checks their number."""
    if recipe.reward.weights:
        options.setdefault("weights", recipe.reward.weights)
    weights, functions = options.get("weights"), len(recipe.reward.functions)
    if isinstance(weights, list) and len(weights) != functions:
        raise RecipeError(
            f"algorithm.estimator_args.weights has {len(weights)} entries for {functions} reward.functions: give one a "
            "function"
        )


def _shaping(recipe: Recipe) -> str:
    """What changes the reward after the functions' weighted sum, and the way out; empty: nothing."""
    reward, actor = recipe.reward, recipe.actor
    if reward.overlong_buffer_len and reward.overlong_penalty_factor:
        return (
            f"set reward.overlong_buffer_len ({reward.overlong_buffer_len}) to 0, or make the penalty one of "
            "reward.functions"
        )
    if actor.kl_placement == "reward" and actor.kl_loss_coef:
        return "set actor.kl_placement (reward) to loss"
    return ""


def _check_general_keys(a: AlgorithmConfig) -> None:
    """Refuses a value of algorithm.gamma or norm_adv_by_std_in_grpo that the estimator does not know and does not have."""
    known = {option.name for option in ESTIMATORS.options(a.adv_estimator)}
    fixed = ESTIMATORS.target(a.adv_estimator)
    for key, option in (("gamma", "gamma"), ("norm_adv_by_std_in_grpo", "norm_by_std")):
        value, default = getattr(a, key), getattr(AlgorithmConfig, key)
        if option not in known and value not in (default, getattr(fixed, option, default)):
            raise RecipeError(
                f"algorithm.{key} is {value}, but {ESTIMATORS.label(a.adv_estimator)} does not know it, so it would change "
                "nothing: remove it, or choose another estimator"
            )


def advantage_stage(recipe: Recipe, estimator: Any, needs: dict[str, Any], ranks: Ranks) -> AdvantageStage:
    """The estimator, with what it says it needs."""
    return AdvantageStage(
        estimator,
        mask_truncated=recipe.algorithm.mask_truncated_responses,
        greedy_baseline=bool(needs["greedy_baseline"]),
        min_group_size=int(needs["min_group_size"]),
        functions=tuple(function_names(recipe.reward.functions)) if needs["per_function_rewards"] else None,
        all_reduce=partial(ranks.sum, what="estimator") if needs["whole_batch"] else None,
        label=ESTIMATORS.label(recipe.algorithm.adv_estimator),
    )


def build_policy_loss(recipe: Recipe) -> Any:
    """The policy loss of the recipe with the actor's clip bounds; refuses bounds that could not take effect."""
    actor, name = recipe.actor, recipe.actor.policy_loss_fn
    check_kl_name(actor.kl_loss_type)
    known = {option.name for option in LOSSES.options(name)}
    options = dict(actor.policy_loss_args)
    uses_clip_ratio = False
    for option, value in (("clip_ratio_low", actor.clip_ratio_low), ("clip_ratio_high", actor.clip_ratio_high)):
        if value is not None and option not in known:
            raise RecipeError(f"actor.{option} is {value}, but {LOSSES.label(name)} does not take it: remove it")
        if value is not None and options.get(option, value) != value:
            raise RecipeError(
                f"actor.{option} is {value} but actor.policy_loss_args.{option} is {options[option]}: remove one of them"
            )
        if option in known and option not in options:
            uses_clip_ratio |= value is None
            options[option] = actor.clip_ratio if value is None else value
    default = ActorConfig.clip_ratio
    if actor.clip_ratio != default and not uses_clip_ratio:
        raise RecipeError(
            f"actor.clip_ratio is {actor.clip_ratio}, which changes nothing: {LOSSES.label(name)} takes no clip bounds, or "
            f"both are set (actor.clip_ratio_low, clip_ratio_high, policy_loss_args); remove it, or them"
        )
    return get_policy_loss(name, **options)


def check_heldout_metric(recipe: Recipe) -> None:
    """Refuses a train.heldout_metric that no reward function has."""
    _check_metric("train.heldout_metric", recipe.train.heldout_metric, recipe)


def _check_metric(key: str, name: str, recipe: Recipe) -> None:
    metrics = ["score", *function_names(recipe.reward.functions)]
    if name not in metrics:
        raise RecipeError(f"{key} is {name!r}: choose one of {', '.join(metrics)}")


def build_filter(recipe: Recipe) -> Any:
    """The group filter of the recipe."""
    f = recipe.algorithm.filter_groups
    _check_metric("algorithm.filter_groups.metric_to_filter", f.metric_to_filter, recipe)
    takes_tolerance = "tolerance" in {option.name for option in FILTERS.options(f.filter)}
    if f.tolerance and not (takes_tolerance and f.filter_args.get("tolerance", f.tolerance) == f.tolerance):
        raise RecipeError(
            f"algorithm.filter_groups.tolerance is {f.tolerance}, but {FILTERS.label(f.filter)} does not take it, or "
            "filter_args gives another: remove one of them"
        )
    return get_filter(f.filter, **({"tolerance": f.tolerance} if takes_tolerance else {}) | f.filter_args)


def load_tokenizer(path: str, model: ModelConfig) -> Any:
    """The tokenizer of the model; a folder without one is refused in one sentence."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises many types for the same fact
        raise _no_tokenizer(path, _first_line(error)) from None
    # Where the files are missing, transformers may make a tokenizer of the model's class that knows no word.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise _no_tokenizer(path, "there are no tokenizer files")
    return tokenizer


def check_optimizer(recipe: Recipe, config: dict[str, Any]) -> None:
    """Makes ready, or refuses, the compiled optimizer that the actor's DeepSpeed configuration asks for."""
    if offloads_optimizer(config):
        backend.load_cpu_adam(recipe.train.start_timeout_s)


def check_models(recipe: Recipe, path: str, bases: list[Path]) -> None:
    """Refuses what the policy at `path`, or the reference, cannot do, before weights are read or an engine starts."""
    policy = _empty_model("model.path", path, recipe.model)
    find_targets(policy, recipe.model.lora.targets if recipe.model.lora.rank else ())
    if recipe.model.gradient_checkpointing:
        backend.recompute_activations(policy)
    named = recipe.reference.path
    if named and recipe.actor.kl_loss_coef > 0:
        _empty_model("reference.path", str(resolve_path(named, bases) or named), recipe.model)


def _empty_model(key: str, path: str, model: ModelConfig) -> Any:
    """The model as it would be trained, without memory for its weights."""
    try:
        empty = _without_weights(path, model, model.attn_implementation)
    except Exception as error:  # transformers and the packages of attention kernels raise many types
        raise _unfit(key, path, model, error) from None
    backend.check_head(empty, f"{key}: {path}")
    return empty


def _without_weights(path: str, model: ModelConfig, attention: str) -> Any:
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, backend.resolve_dtype(model)),
            attn_implementation=attention,
            trust_remote_code=model.trust_remote_code,
        )


def _unfit(key: str, path: str, model: ModelConfig, error: Exception) -> RecipeError:
    """What to say of `error`: whether the model cannot be built, or only not with this attention."""
    try:
        _without_weights(path, model, "eager")
    except Exception as reason:
        return RecipeError(
            f"{key}: transformers can build no causal language model from {path} ({_first_line(reason)}): correct the path, "
            "or its config.json"
        )
    return RecipeError(
        f"model.attn_implementation: {model.attn_implementation} cannot be used here ({_first_line(error)}): choose sdpa or "
        "eager, or install the package that it needs"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)


def _no_tokenizer(path: str, reason: str) -> RecipeError:
    if Path(path).is_absolute() and not Path(path).is_dir():
        return RecipeError(f"model.path: there is no folder {path}: correct the path, or give a hub name")
    return RecipeError(
        f"model.path: no tokenizer could be loaded from {path} ({reason}): put tokenizer.json and "
        "tokenizer_config.json into the folder"
    )


def make_node_engine(recipe: Recipe, model_path: str, dtype: str, folder: Path, ranks: Ranks) -> GenerationEngine:
    """This node's generation engine, not started."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    mine = replace(recipe, engine=_engine_config(recipe, ranks))
    return _engine(mine, model_path, dtype, logs / f"node-{ranks.node}" if ranks.nodes > 1 else logs)


def weight_transport(recipe: Recipe, ranks: Ranks) -> Transport:
    """How weights reach this node's engine; refuses a sync.transport that is impossible there."""
    return choose_transport(recipe.sync, _engine_config(recipe, ranks), backend.device_kind())


def _engine_config(recipe: Recipe, ranks: Ranks) -> EngineConfig:
    """The engine settings of this node, which drives its own part of engine.urls."""
    return replace(recipe.engine, urls=urls_of_node(recipe.engine.urls, ranks.node, ranks.nodes))


def colocation(recipe: Recipe, ranks: Ranks, engine: GenerationEngine | None, publisher: WeightPublisher) -> Colocation:
    """What makes room on shared devices; where the device is the CPU there is nothing to measure."""
    measure = backend.free_device_memory if backend.device_kind() != "cpu" else None
    return Colocation(recipe.engine, ranks, engine, measure, publisher.model_bytes)


def check_engine(recipe: Recipe, model_path: str) -> None:
    """Refuses wrong engine settings while the run has no folder yet; starts nothing."""
    _engine(recipe, model_path, backend.resolve_dtype(recipe.model), Path()).close()


def _engine(recipe: Recipe, model_path: str, dtype: str, log_dir: Path) -> GenerationEngine:
    return make_engine(
        recipe.engine,
        model_path=model_path,
        dtype=dtype,
        max_model_len=recipe.data.max_prompt_tokens + recipe.rollout.max_response_tokens,
        log_dir=log_dir,
        device=backend.device_kind(),
        seed=recipe.train.seed,
        trust_remote_code=recipe.model.trust_remote_code,
        update_timeout_s=recipe.sync.timeout_s,
    )


def fresh_state(world: int, must_match: dict[str, Any]) -> TrainerState:
    """The state before the first round."""
    totals = {"seconds": 0.0, "samples": 0.0, "tokens_generated": 0.0, "tokens_trained": 0.0}
    return TrainerState(0, 0, 0, 0, world, must_match, totals)
