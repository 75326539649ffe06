"""What is installed, as text: for `grpo-ds plugins` and for `launch/train.py --help`. Imports no torch itself, but the
groups it lists do: call it only when someone asked."""

from __future__ import annotations

from grpo_ds.plugin_options import Option
from grpo_ds.plugins import PluginRow, list_plugins

GROUPS = {
    "grpo_ds.estimators": "algorithm.adv_estimator, options in algorithm.estimator_args",
    "grpo_ds.losses": "actor.policy_loss_fn, options in actor.policy_loss_args",
    "grpo_ds.filters": "algorithm.filter_groups",
    "grpo_ds.rewards": "reward.functions, options of classes in reward.function_args",
}
"""Entry-point group -> the recipe keys that choose from it."""


def describe_group(group: str) -> str:
    """All plugins of a group: where each comes from, what it needs, its options; a broken one with its sentence."""
    rows = [_describe(row) for row in list_plugins(group)]
    return "\n".join([f"{group} ({GROUPS[group]})", *rows])


def plugin_help() -> str:
    """The options of all estimators and policy losses, built in or installed, to follow the recipe keys in `--help`."""
    groups = [describe_group(group) for group in ("grpo_ds.estimators", "grpo_ds.losses")]
    return "\n\n".join(["Plugins and their options (grpo-ds plugins lists the other groups, too):", *groups])


def _describe(row: PluginRow) -> str:
    lines = [f"  {row.name}  [{row.source}]"]
    if row.problem:
        return "\n".join([*lines, f"      BROKEN: {row.problem}"])
    lines += [f"      {row.doc}"] if row.doc else []
    needs = [_need(name, value) for name, value in row.needs.items() if value is True or value > 1]
    lines += [f"      needs: {', '.join(needs)}"] if needs else []
    lines += [f"      {_option(option)}" for option in row.options]
    return "\n".join(lines)


def _need(name: str, value: bool | int) -> str:
    return name if value is True else f"{name} {value}"


def _option(option: Option) -> str:
    default = "required" if option.required else f"default {option.default!r}"
    doc = option.doc.partition("\n")[0]
    return f"{option.name}: {option.type} ({default})" + (f"  {doc}" if doc else "")
