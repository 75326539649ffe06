"""Settings that cannot stand, each with the reason and what to do; most are in different sections. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_ds.config import Recipe


def contradictions(recipe: Recipe) -> Iterator[str]:
    """One sentence for each."""
    yield from _about_sampling(recipe)
    yield from _about_engine(recipe)
    yield from _about_sync_mode(recipe)
    yield from _about_lora(recipe)


def _about_sampling(recipe: Recipe) -> Iterator[str]:
    r = recipe.rollout
    for key in ("level", "reject"):
        if getattr(recipe.algorithm.importance, key) != "off" and (r.top_p != 1.0 or r.top_k != 0):
            yield (
                f"rollout.top_p and rollout.top_k must be off while algorithm.importance.{key} is not off: the engine "
                "normalises over the kept tokens only, so importance weights would be wrong; set "
                f"algorithm.importance.{key}: off, or sample from the full distribution"
            )
    if recipe.algorithm.filter_groups.enable and r.n < 2:
        yield "algorithm.filter_groups.enable needs rollout.n >= 2: the scores of a single response never differ"
    drawn = recipe.algorithm.filter_groups.max_num_gen_batches * recipe.prompts_per_batch
    if 0 < drawn < recipe.train.prompts_per_round:
        yield (
            f"rollout.prompts_per_batch ({recipe.prompts_per_batch}) x algorithm.filter_groups.max_num_gen_batches gives "
            f"{drawn} groups at most, which never fill a round of train.prompts_per_round "
            f"({recipe.train.prompts_per_round}): raise one of the first two"
        )
    if recipe.reward.overlong_buffer_len > r.max_response_tokens:
        yield (
            f"reward.overlong_buffer_len ({recipe.reward.overlong_buffer_len}) exceeds rollout.max_response_tokens "
            f"({r.max_response_tokens}): the buffer is the last part of the longest response"
        )
    longest = recipe.data.max_prompt_tokens + r.max_response_tokens
    if longest > recipe.train.micro_batch_tokens:
        yield (
            f"train.micro_batch_tokens ({recipe.train.micro_batch_tokens}) is below data.max_prompt_tokens + "
            f"rollout.max_response_tokens ({longest}): a sequence is never split, so the longest one must fit"
        )


def _about_engine(recipe: Recipe) -> Iterator[str]:
    engine = recipe.engine
    if engine.urls and engine.replicas > 1:
        yield "engine.replicas counts servers that the run starts, and engine.urls names others: remove one of them"
    if engine.max_restarts > 0 and recipe.sync.timeout_s <= engine.stall_timeout_s:
        yield (
            f"sync.timeout_s ({recipe.sync.timeout_s:g}) does not exceed engine.stall_timeout_s "
            f"({engine.stall_timeout_s:g}), so a server that hangs in a weight update would end the run although "
            "engine.max_restarts allows failures: raise the first or lower the second"
        )
    if engine.urls and engine.sleep:
        yield (
            "engine.sleep is for servers that share the trainer's GPUs, which the run starts itself, and engine.urls names "
            "others: remove one of them"
        )


def _about_sync_mode(recipe: Recipe) -> Iterator[str]:
    mode = recipe.sync.mode
    if mode != "drain" and recipe.engine.kind == "hf":
        yield (
            f"sync.mode {mode} needs an engine that answers while the trainer works, and engine.kind hf is part of the "
            "trainer: set sync.mode: drain"
        )
    if mode == "keep" and recipe.engine.sleep:
        yield (
            "sync.mode keep needs an engine that works beside the trainer, and engine.sleep takes its memory away: set "
            "sync.mode: abort"
        )


def _about_lora(recipe: Recipe) -> Iterator[str]:
    lora = recipe.model.lora
    if lora.rank < 0:
        yield "model.lora.rank must not be negative (0 switches LoRA off)"
    if not 0 < lora.alpha < math.inf:
        yield "model.lora.alpha must be positive"
    if not lora.targets:
        yield "model.lora.targets is empty: name at least one linear layer"
