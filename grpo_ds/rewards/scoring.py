"""One batch of samples through all reward functions: what is out, what came back, and who is to blame for a failure.

A call holds the responses of one prompt, so a function may compare them. It has `reward.timeout_s` for all of them,
which suits functions that take no time. Where a call fails (raises, misses the deadline, loses its process), each of its
samples is tried alone, with the deadline to itself; those that fail again are guilty: they end the run, or are unscored,
whatever the other functions say (`reward.on_error`). The others are then called once more, together, with that deadline
each, and this call gives their values. A function whose call was late although none of its samples is gets that longer
deadline from then on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from pebble import ProcessExpired

from grpo_ds.config import RecipeError, RewardConfig
from grpo_ds.rewards import worker
from grpo_ds.rewards.batch import RewardBatch
from grpo_ds.rewards.processes import WorkerProcesses

log = logging.getLogger(__name__)

START_S = 60.0
"""Deadline for a fresh process to load the reward functions, in seconds."""
REASONS_SHOWN = 3
"""Reasons for which a function gave no value that are shown in a run, each once."""
_MAX_RESTARTS = 3
_CALLS_REMEMBERED = 4096


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
    """95th percentile of the duration of a successful call, in seconds."""


@dataclass(slots=True)
class FunctionState:
    """One reward function in the course of a run."""

    name: str
    slow: bool = False
    """A call may take `reward.timeout_s` for each of its samples."""
    samples: int = 0
    unscored: int = 0
    timeouts: int = 0
    errors: int = 0
    call_s: deque[float] = field(default_factory=lambda: deque(maxlen=_CALLS_REMEMBERED))
    shown: set[str] = field(default_factory=set)
    """Reasons that were shown."""

    def take_stats(self) -> FunctionStats:
        """The counts since the last call."""
        ordered = sorted(self.call_s)
        p95 = ordered[-(-95 * len(ordered) // 100) - 1] if ordered else 0.0  # nearest rank
        stats = FunctionStats(self.samples, self.unscored, self.timeouts, self.errors, p95)
        self.samples = self.unscored = self.timeouts = self.errors = 0
        self.call_s.clear()
        return stats

    def left_out(self, reason: str, where: str) -> None:
        """Shows why a sample has no value, for the first reasons of the run."""
        if reason not in self.shown and len(self.shown) < REASONS_SHOWN:
            self.shown.add(reason)
            log.warning("reward %s %s on %s: left out (reward.on_error: unscored)", self.name, reason, where)


@dataclass(slots=True)
class _Trial:
    """The samples of a failed call, each tried alone."""

    late: bool
    """The call missed its deadline."""
    pending: int
    good: dict[int, float | None] = field(default_factory=dict)
    """Values of the samples that did not fail alone."""
    late_alone: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    which: int
    """Number of the function."""
    samples: tuple[int, ...]
    """Positions in the batch."""
    timeout_s: float
    trial: _Trial | None = None
    """Of what this sample is tried alone for."""
    again: bool = False
    """The samples of a failed call that did not fail alone."""


class Scoring:
    """One `RewardPool.score` call."""

    def __init__(
        self,
        processes: WorkerProcesses,
        functions: Sequence[FunctionState],
        config: RewardConfig,
        batch: RewardBatch,
    ) -> None:
        self._processes, self._functions, self._config, self._batch = processes, functions, config, batch
        self._values: list[list[float | None]] = [[None] * len(batch.rows) for _ in functions]
        self._guilty: set[int] = set()
        self._out: dict[Future[Any], _Job] = {}
        self._done: SimpleQueue[Future[Any]] = SimpleQueue()
        self._restarts = 0

    def run(self, sizes: Sequence[int]) -> tuple[list[list[float | None]], set[int]]:
        """[function][sample], and the samples on which any function failed.

        sizes: the samples of each prompt, which are neighbours.
        """
        for which, function in enumerate(self._functions):
            function.samples += len(self._batch.rows)
            begin = 0
            for size in sizes:
                self._ask(which, range(begin, begin + size))
                begin += size
        try:
            while self._out:
                self._settle_next()
        finally:
            for future in self._out:  # only after an error: the run ends or the caller goes on without them
                future.cancel()
        for function, values in zip(self._functions, self._values, strict=True):
            function.unscored += values.count(None)
        return self._values, self._guilty

    def _ask(self, which: int, samples: Sequence[int]) -> None:
        deadlines = len(samples) if self._functions[which].slow else 1
        self._submit(_Job(which, tuple(samples), deadlines * self._config.timeout_s))

    def _submit(self, job: _Job) -> None:
        future = self._processes.submit(worker.call, (job.which, self._batch.part(job.samples)), job.timeout_s)
        self._out[future] = job
        future.add_done_callback(self._done.put)

    def _settle_next(self) -> None:
        deadline_s = max(job.timeout_s for job in self._out.values()) + START_S
        try:
            future = self._done.get(timeout=deadline_s)
        except Empty:
            raise RewardError(
                f"the reward processes answered none of {len(self._out)} calls within {deadline_s:.0f} s "
                "(reward.timeout_s plus the time to load the functions); check what the reward modules do on import"
            ) from None
        if future not in self._out:  # of processes that were replaced since
            return
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self._restart(str(error))
            return
        self._settle(self._out.pop(future), future, error)

    def _restart(self, reason: str) -> None:
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise RewardError(
                f"the reward processes died {self._restarts} times outside of any call ({reason}); "
                "check the machine's memory and what the reward modules do on import"
            )
        jobs = list(self._out.values())
        self._out.clear()
        self._processes.restart()
        for job in jobs:
            self._submit(job)

    def _settle(self, job: _Job, future: Future[Any], error: BaseException | None) -> None:
        if isinstance(error, TimeoutError):
            self._failed(job, f"missed its deadline of {job.timeout_s:g} s (reward.timeout_s)", late=True)
        elif isinstance(error, ProcessExpired):
            self._failed(job, f"ended its process with exit code {error.exitcode}")
        elif error is not None:
            raise error
        else:
            self._answered(job, future.result())

    def _answered(self, job: _Job, result: worker.CallResult) -> None:
        function = self._functions[job.which]
        if result.status == "ok":
            function.call_s.append(result.seconds)
            if job.trial is None:
                self._set(job, result.values)
            else:
                job.trial.good[job.samples[0]] = result.values[0]
                self._tried(job.which, job.trial)
        elif result.status == "recipe":
            raise RecipeError(result.message)
        elif result.status == "count":
            raise RewardError(f"reward {function.name} {result.message}; return one number or None a completion")
        elif result.status == "value":
            sample = self._batch.describe(job.samples[result.position])
            raise RewardError(
                f"reward {function.name} {result.message} ({sample}); return None where it does not apply"
            )
        else:
            self._failed(job, result.message)

    def _set(self, job: _Job, values: Sequence[float | None]) -> None:
        for sample, value in zip(job.samples, values, strict=True):
            self._values[job.which][sample] = value

    def _failed(self, job: _Job, reason: str, *, late: bool = False) -> None:
        if len(job.samples) > 1 and not job.again:
            trial = _Trial(late, len(job.samples))
            for sample in job.samples:
                self._submit(_Job(job.which, (sample,), self._config.timeout_s, trial))
            return
        where = self._batch.describe(job.samples[0])
        if job.again:
            where = f"{len(job.samples)} responses together, on none of them alone ({where}, is the first)"
        function = self._functions[job.which]
        if self._config.on_error == "fail":
            raise RewardError(
                f"reward {function.name} {reason} on {where}; correct the function, or set "
                "reward.on_error: unscored to leave such samples out"
            )
        self._guilty.update(job.samples)
        function.left_out(reason, where)
        function.timeouts += len(job.samples) * late
        function.errors += len(job.samples) * (not late)
        if job.trial is not None:
            job.trial.late_alone |= late
            self._tried(job.which, job.trial)

    def _tried(self, which: int, trial: _Trial) -> None:
        """One more sample of a failed call has been tried; after the last one, those that did not fail are called."""
        trial.pending -= 1
        if trial.pending:
            return
        rest = tuple(sorted(trial.good))
        if len(rest) == 1:  # the same call again
            self._values[which][rest[0]] = trial.good[rest[0]]
        elif rest:
            self._functions[which].slow |= trial.late and not trial.late_alone
            self._submit(_Job(which, rest, len(rest) * self._config.timeout_s, again=True))
