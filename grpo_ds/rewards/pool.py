"""`RewardPool`: calls the reward functions of a recipe in killable processes, with a deadline for every sample.

Samples are sent in chunks. A chunk that misses the deadline, raises or loses its process is repeated sample by
sample, so that exactly the guilty sample is found; `reward.on_error` says whether it ends the run or counts as
`cannot be scored`. Returned values are checked and never repaired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pebble import ProcessExpired

from grpo_ds.config import RecipeError, RewardConfig
from grpo_ds.rewards import worker
from grpo_ds.rewards.batch import RewardBatch
from grpo_ds.rewards.combine import make_group
from grpo_ds.rewards.processes import WorkerProcesses, first_done
from grpo_ds.rewards.resolve import function_names
from grpo_ds.types import Group, Prompt, Rollout

CHUNK_SAMPLES = 16
"""Samples of one call."""
START_S = 60.0
"""Deadline for a fresh process to load the reward functions, in seconds."""
_MAX_RESTARTS = 3


class RewardError(RuntimeError):
    """A reward function failed on a sample; the message names the function, the sample and the reason."""


@dataclass(frozen=True, slots=True)
class FunctionStats:
    """What one reward function did since the last `take_stats`."""

    samples: int
    """Samples it was asked about."""
    unscored: int
    """Samples without a value: the function returned None, or failed while `on_error: unscored`."""
    timeouts: int
    """Samples that missed the deadline."""
    errors: int
    """Samples on which it raised or its process died."""
    p95_call_s: float
    """95th percentile of the duration of a successful call (a chunk of samples), in seconds."""


@dataclass(slots=True)
class _Counter:
    samples: int = 0
    unscored: int = 0
    timeouts: int = 0
    errors: int = 0
    call_s: list[float] = field(default_factory=list)

    def stats(self) -> FunctionStats:
        ordered = sorted(self.call_s)
        p95 = ordered[max(0, -(-95 * len(ordered) // 100) - 1)] if ordered else 0.0  # nearest rank
        return FunctionStats(self.samples, self.unscored, self.timeouts, self.errors, p95)


@dataclass(frozen=True, slots=True)
class _Job:
    which: int
    """Number of the function."""
    samples: range
    """Positions in the batch."""


class RewardPool:
    """The reward functions of `config`, in `config.workers` processes.

    `base_dirs`: folders in which `path/file.py:function` is looked up, in order. Use as a context manager, or call
    `close`. Not for use from several threads at once; see `WorkerProcesses` for which thread should start it.
    """

    def __init__(self, config: RewardConfig, base_dirs: Sequence[Path]) -> None:
        self.names = function_names(config.functions)
        """Name of each function, as in `Scored.parts`."""
        self._config = config
        self._processes = WorkerProcesses(config.functions, base_dirs, config.workers)
        self._counters = [_Counter() for _ in config.functions]
        # A function for which a whole chunk takes longer than the deadline of a sample gets one sample a call.
        self._chunk = [CHUNK_SAMPLES] * len(config.functions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def warm_up(self) -> None:
        """Starts the processes and returns at once, so that they load while a model does."""
        self._processes.warm_up()

    def close(self) -> None:
        """Ends all reward processes within 5 seconds."""
        self._processes.close()

    def pids(self) -> list[int]:
        """Ids of the living reward processes."""
        return self._processes.pids()

    def take_stats(self) -> dict[str, FunctionStats]:
        """Counts of each function since the last call."""
        taken = {name: counter.stats() for name, counter in zip(self.names, self._counters, strict=True)}
        self._counters = [_Counter() for _ in self.names]
        return taken

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        rows: Sequence[int] | None = None,
    ) -> list[dict[str, float | None]]:
        """Every function's value of every sample: N mappings {function name: value or None}.

        All arguments have N entries. `prompts` are strings or lists of messages; `completions` are strings and reach
        the function as messages where the prompt is one. `rows` are the rows of the data file, for messages only.
        Raises RewardError (see `reward.on_error`) and RecipeError when a function cannot be loaded or called.
        """
        batch = RewardBatch.make(prompts, completions, completion_ids, columns, rows)
        return _Scoring(self, batch, self._config.on_error == "fail").run()

    def score_groups(
        self, pairs: Sequence[tuple[Prompt, Sequence[Rollout]]], *, max_response_tokens: int
    ) -> list[Group]:
        """One group a prompt; score, reward and parts as in `make_group`. `max_response_tokens`: the longest response
        the run allows, in tokens, from which the overlong penalty counts."""
        flat = [(prompt, rollout) for prompt, rollouts in pairs for rollout in rollouts]
        names = sorted({name for prompt, _ in flat for name in prompt.columns})
        parts = self.score(
            [prompt.text for prompt, _ in flat],
            [rollout.text for _, rollout in flat],
            [list(rollout.token_ids) for _, rollout in flat],
            {name: [prompt.columns.get(name) for prompt, _ in flat] for name in names},
            [prompt.row for prompt, _ in flat],
        )
        groups, begin = [], 0
        for prompt, rollouts in pairs:
            own = parts[begin : begin + len(rollouts)]
            groups.append(make_group(prompt, rollouts, own, self._config, max_response_tokens))
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
        )
        for name, stats in self.take_stats().items():
            if stats.timeouts + stats.errors == stats.samples:
                raise RewardError(
                    f"reward {name} failed on all {stats.samples} samples of the dry run ({stats.errors} errors, "
                    f"{stats.timeouts} timeouts); set reward.on_error: fail to see the first of them"
                )


class _Scoring:
    """One `score` call: which jobs are out, and what came back."""

    def __init__(self, pool: RewardPool, batch: RewardBatch, fail: bool) -> None:
        self._pool, self._batch, self._fail = pool, batch, fail
        self._values: list[list[float | None]] = [[None] * len(batch.rows) for _ in pool.names]
        self._out: dict[Future[Any], _Job] = {}
        self._restarts = 0
        # Functions with a chunk that missed its deadline, and whether one of its samples did so alone.
        self._slow_chunks: dict[int, bool] = {}

    def run(self) -> list[dict[str, float | None]]:
        total = len(self._batch.rows)
        for which, step in enumerate(self._pool._chunk):
            self._pool._counters[which].samples += total
            for begin in range(0, total, step):
                self._submit(_Job(which, range(begin, min(begin + step, total))))
        try:
            while self._out:
                self._settle_some()
        finally:
            for future in self._out:  # only after an error: the run ends or the caller goes on without them
                future.cancel()
        for which, guilty_alone in self._slow_chunks.items():
            self._pool._chunk[which] = self._pool._chunk[which] if guilty_alone else 1
        for counter, values in zip(self._pool._counters, self._values, strict=True):
            counter.unscored += values.count(None)
        return [dict(zip(self._pool.names, parts, strict=True)) for parts in zip(*self._values, strict=True)]

    def _submit(self, job: _Job) -> None:
        arguments = (job.which, self._batch.part(job.samples))
        future = self._pool._processes.submit(worker.call, arguments, self._pool._config.timeout_s)
        self._out[future] = job

    def _settle_some(self) -> None:
        deadline_s = self._pool._config.timeout_s + START_S
        done = first_done(list(self._out), deadline_s)
        if not done:
            raise RewardError(
                f"the reward processes answered none of {len(self._out)} calls within {deadline_s:.0f} s "
                "(reward.timeout_s plus the time to load the functions); check what the reward modules do on import"
            )
        broken = [future for future in done if isinstance(future.exception(), BrokenProcessPool)]
        for future in done.difference(broken):
            self._settle(self._out.pop(future), future)
        if broken:
            self._restart(str(broken[0].exception()))

    def _restart(self, reason: str) -> None:
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise RewardError(
                f"the reward processes died {self._restarts} times outside of any call ({reason}); "
                "check the machine's memory and what the reward modules do on import"
            )
        jobs = list(self._out.values())
        self._out.clear()
        self._pool._processes.restart()
        for job in jobs:
            self._submit(job)

    def _settle(self, job: _Job, future: Future[Any]) -> None:
        error, counter = future.exception(), self._pool._counters[job.which]
        if isinstance(error, TimeoutError):
            if len(job.samples) == 1:
                counter.timeouts += 1
                self._slow_chunks[job.which] = True
            else:
                self._slow_chunks.setdefault(job.which, False)
            self._failed(job, f"missed its deadline of {self._pool._config.timeout_s:g} s (reward.timeout_s)")
        elif isinstance(error, ProcessExpired):
            counter.errors += len(job.samples) == 1
            self._failed(job, f"ended its process with exit code {error.exitcode}")
        elif error is not None:
            raise error
        else:
            self._answered(job, future.result())

    def _answered(self, job: _Job, result: worker.CallResult) -> None:
        counter, name = self._pool._counters[job.which], self._pool.names[job.which]
        if result.status == "ok":
            counter.call_s.append(result.seconds)
            self._values[job.which][job.samples.start : job.samples.stop] = result.values
        elif result.status == "recipe":
            raise RecipeError(result.message)
        elif result.status == "count":
            raise RewardError(f"reward {name} {result.message}; return one number or None a completion")
        elif result.status == "value":
            sample = self._batch.describe(job.samples[result.position])
            raise RewardError(f"reward {name} {result.message} ({sample}); return None for `cannot be scored`")
        else:
            counter.errors += len(job.samples) == 1
            self._failed(job, result.message)

    def _failed(self, job: _Job, reason: str) -> None:
        if len(job.samples) > 1:
            for sample in job.samples:
                self._submit(_Job(job.which, range(sample, sample + 1)))
        elif self._fail:
            where = self._batch.describe(job.samples[0])
            raise RewardError(
                f"reward {self._pool.names[job.which]} {reason} on {where}; correct the function, or set "
                "reward.on_error: unscored to leave such samples out"
            )
