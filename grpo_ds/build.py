"""Pieces of the start-up that `grpo_ds.train` puts together: each checks its input and speaks in the user's terms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo_ds.actor import backend
from grpo_ds.actor.checkpoint import TrainerState, checkpoints_of, read_state
from grpo_ds.config import AlgorithmConfig, EngineConfig, ModelConfig, Recipe, RecipeError
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
from grpo_ds.rewards import function_names
from grpo_ds.runlog import new_run_folder
from grpo_ds.samples import AdvantageStage
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
    options = estimator_options(a.adv_estimator, a.norm_adv_by_std_in_grpo, a.gamma, a.estimator_args)
    if recipe.reward.weights and "weights" in {option.name for option in ESTIMATORS.options(a.adv_estimator)}:
        options.setdefault("weights", recipe.reward.weights)
    estimator = get_estimator(a.adv_estimator, **options)
    needs = ESTIMATORS.needs(estimator)
    if recipe.rollout.n < int(needs.get("min_group_size", 1)):
        raise RecipeError(
            f"algorithm.adv_estimator: {ESTIMATORS.label(a.adv_estimator)} compares the responses of a prompt and needs at "
            f"least {needs['min_group_size']} of them: rollout.n is {recipe.rollout.n}"
        )
    return estimator, needs


def build_advantage_stage(recipe: Recipe, estimator: Any, needs: dict[str, Any], ranks: Ranks) -> AdvantageStage:
    """The estimator, with what it says it needs."""
    return AdvantageStage(
        estimator,
        mask_truncated=recipe.algorithm.mask_truncated_responses,
        greedy_baseline=bool(needs["greedy_baseline"]),
        min_group_size=int(needs["min_group_size"]),
        functions=tuple(function_names(recipe.reward.functions)) if needs["per_function_rewards"] else None,
        all_reduce=partial(ranks.sum, what="estimator") if needs["whole_batch"] else None,
    )


def build_policy_loss(recipe: Recipe) -> Any:
    """The policy loss of the recipe with the actor's clip bounds, where it clips."""
    actor = recipe.actor
    check_kl_name(actor.kl_loss_type)
    known = {option.name for option in LOSSES.options(actor.policy_loss_fn)}
    low, high = actor.clip_bounds
    bounds = {"clip_ratio_low": low, "clip_ratio_high": high}
    options = {name: value for name, value in bounds.items() if name in known} | actor.policy_loss_args
    return get_policy_loss(actor.policy_loss_fn, **options)


def build_filter(recipe: Recipe) -> Any:
    """The group filter of the recipe."""
    f = recipe.algorithm.filter_groups
    metrics = ["score", *function_names(recipe.reward.functions)]
    if f.metric_to_filter not in metrics:
        raise RecipeError(
            f"algorithm.filter_groups.metric_to_filter is {f.metric_to_filter!r}: choose one of {', '.join(metrics)}"
        )
    takes_tolerance = "tolerance" in {option.name for option in FILTERS.options(f.filter)}
    return get_filter(f.filter, **({"tolerance": f.tolerance} if takes_tolerance else {}) | f.filter_args)


def load_tokenizer(path: str, model: ModelConfig) -> Any:
    """The tokenizer of the model; a folder without one is refused in one sentence."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises many types for the same fact
        raise _no_tokenizer(
            path, str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        ) from None
    # Where the files are missing, transformers may make a tokenizer of the model's class that knows no word.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise _no_tokenizer(path, "there are no tokenizer files")
    return tokenizer


def check_lora(path: str, model: ModelConfig) -> None:
    """Refuses adapters that do not fit the model, before its weights are read."""
    if not model.lora.rank:
        return
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    find_targets(empty, model.lora.targets)


def _no_tokenizer(path: str, reason: str) -> RecipeError:
    if Path(path).is_absolute() and not Path(path).is_dir():
        return RecipeError(f"model.path: there is no folder {path}: correct the path, or give a hub name")
    return RecipeError(
        f"model.path: no tokenizer could be loaded from {path} ({reason}): put tokenizer.json and "
        "tokenizer_config.json into the folder"
    )


def find_run(recipe: Recipe) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from (None: a new run).

    resume auto: the newest run of run.name that has a whole checkpoint, else a new run. resume PATH: that
    run. Refuses a run that has nothing left to train. Main rank only.
    """
    base = Path(recipe.run.dir)
    if recipe.resume is None:
        return new_run_folder(recipe), None
    if recipe.resume == "auto":
        runs = sorted((p for p in base.glob(f"{recipe.run.name}-*") if checkpoints_of(p)), key=_last_write)
        if not runs:
            print(f"resume auto: no run of {base}/{recipe.run.name}-* has a checkpoint, so a new one starts")
            return new_run_folder(recipe), None
        run = runs[-1]
    else:
        run = Path(recipe.resume)
        if not checkpoints_of(run):
            raise RecipeError(f"--resume {run}: no whole checkpoint under {run}/checkpoints; name a run's folder")
    checkpoint = checkpoints_of(run)[-1]
    state = read_state(checkpoint)
    if state.round >= recipe.train.rounds:
        raise RecipeError(
            f"--resume: {checkpoint} already holds {state.round} rounds and train.rounds is {recipe.train.rounds}: raise "
            "train.rounds, or start a new run without --resume"
        )
    return run.resolve(), checkpoint.resolve()


def _last_write(run: Path) -> float:
    return checkpoints_of(run)[-1].stat().st_mtime


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
    )


def fresh_state(world: int, must_match: dict[str, Any]) -> TrainerState:
    """The state before the first round."""
    totals = {"seconds": 0.0, "samples": 0.0, "tokens_generated": 0.0, "tokens_trained": 0.0}
    return TrainerState(0, 0, 0, 0, world, must_match, totals)
