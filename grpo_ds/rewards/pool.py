"""`RewardPool`: calls the reward functions of a recipe in killable processes, with a deadline for every sample.

A call holds the responses of one prompt, all of them; `grpo_ds.rewards.scoring` says what happens to one that fails.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo_ds.config import RecipeError, RewardConfig
from grpo_ds.rewards.batch import RewardBatch
from grpo_ds.rewards.combine import make_group
from grpo_ds.rewards.processes import WorkerProcesses
from grpo_ds.rewards.resolve import function_names
from grpo_ds.rewards.scoring import FunctionState, FunctionStats, RewardError, Scoring
from grpo_ds.types import Group, Prompt, Rollout


class RewardPool:
    """The reward functions of `config`, in `config.workers` processes.

    `base_dirs`: folders in which `path/file.py:function` is looked up, in order. Use as a context manager, or call
    `close`. Not for use from several threads at once; see `WorkerProcesses` for which thread should start it.
    """

    def __init__(self, config: RewardConfig, base_dirs: Sequence[Path]) -> None:
        self.names = function_names(config.functions)
        """Name of each function, as in `Scored.parts`."""
        for name in config.function_args:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=1) or self.names
                raise RecipeError(
                    f"reward.function_args names {name!r}, which is no reward function: is it {near[0]!r}?"
                )
        options = [config.function_args.get(name, {}) for name in self.names]
        self._config = config
        self._processes = WorkerProcesses(config.functions, options, base_dirs, config.workers)
        self._functions = [FunctionState(name) for name in self.names]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all reward processes within 5 seconds."""
        self._processes.close()

    def pids(self) -> list[int]:
        """Ids of the living reward processes."""
        return self._processes.pids()

    def take_stats(self) -> dict[str, FunctionStats]:
        """Counts of each function since the last call."""
        return {function.name: function.take_stats() for function in self._functions}

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        rows: Sequence[int] | None = None,
        group_sizes: Sequence[int] | None = None,
    ) -> tuple[list[dict[str, float | None]], set[int]]:
        """Every function's value of every sample, N mappings {function name: value or None}, and the samples on which any
        function failed (with `reward.on_error: unscored`).

        All arguments have N entries. `prompts` are strings or lists of messages; `completions` are strings and reach
        the function as messages where the prompt is one. `rows` are the rows of the data file, for messages only.
        `group_sizes`: how many neighbours belong to one prompt and go into one call; None: all of them do.
        Raises RewardError (see `reward.on_error`) and RecipeError when a function cannot be loaded or called.
        """
        batch = RewardBatch.make(prompts, completions, completion_ids, columns, rows)
        sizes = [len(batch.rows)] if group_sizes is None else group_sizes
        values, failed = Scoring(self._processes, self._functions, self._config, batch).run(sizes)
        return [dict(zip(self.names, parts, strict=True)) for parts in zip(*values, strict=True)], failed

    def score_groups(
        self, pairs: Sequence[tuple[Prompt, Sequence[Rollout]]], *, max_response_tokens: int
    ) -> list[Group]:
        """One group a prompt; score, reward and parts as in `make_group`. `max_response_tokens`: the longest response
        the run allows, in tokens, from which the overlong penalty counts."""
        flat = [(prompt, rollout) for prompt, rollouts in pairs for rollout in rollouts]
        names = sorted({name for prompt, _ in flat for name in prompt.columns})
        parts, failed = self.score(
            [prompt.text for prompt, _ in flat],
            [rollout.text for _, rollout in flat],
            [list(rollout.token_ids) for _, rollout in flat],
            {name: [prompt.columns.get(name) for prompt, _ in flat] for name in names},
            [prompt.row for prompt, _ in flat],
            [len(rollouts) for _, rollouts in pairs],
        )
        groups, begin = [], 0
        for prompt, rollouts in pairs:
            own = parts[begin : begin + len(rollouts)]
            guilty = {k for k in range(len(rollouts)) if begin + k in failed}
            groups.append(make_group(prompt, rollouts, own, self._config, max_response_tokens, guilty))
            begin += len(rollouts)
        return groups

    def dry_run(self, prompts: Sequence[Any], columns: Sequence[Mapping[str, Any]]) -> None:
        """Calls each function on the first `dry_run_rows` rows with an empty and an arbitrary completion.

        `prompts` and `columns` have one entry a row of the data. Raises as `score` does; with `on_error: unscored`
        single failures are allowed, but a function that fails on every one of these samples is refused.
        """
        rows = [row for row in range(min(self._config.dry_run_rows, len(prompts))) for _ in range(2)]
        if not rows:
            return
        names = sorted({name for row in rows for name in columns[row]})
        self.score(
            [prompts[row] for row in rows],
            ["", "0"] * (len(rows) // 2),
            [[], [0]] * (len(rows) // 2),
            {name: [columns[row].get(name) for row in rows] for name in names},
            rows,
            [2] * (len(rows) // 2),
        )
        for name, stats in self.take_stats().items():
            if stats.timeouts + stats.errors == stats.samples:
                raise RewardError(
                    f"reward {name} failed on all {stats.samples} samples of the dry run ({stats.errors} errors, "
                    f"{stats.timeouts} timeouts); set reward.on_error: fail to see the first of them"
                )
