"""`grpo-ds selftest --recipe NAME`: two rounds at learning rate 0 with the run's real parts move nothing, and then other
weights arrive.

What it proves before GPU hours are spent: engine and trainer hold the same model (the parity gate, which names the
cause where they do not), a publication leaves the engine exactly where the trainer is, and the same seeds give the same
samples. The weights of those rounds are the ones that the engine has read from disk, so a publication that loads nothing
would look the same. Therefore every tensor is then changed and published: the engine has to follow, and to be back where
it was when the old weights are published again. With several ranks: `deepspeed --module grpo_ds.selftest --recipe NAME`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_ds.config import RecipeError
from grpo_ds.processes import adopt_slurm, end_with_launcher, leave, on_end_request
from grpo_ds.recipe import read_recipe

if TYPE_CHECKING:
    from grpo_ds.parity import Answers

STILL = (
    *("--actor.lr", "0", "--train.rounds", "2", "--algorithm.filter_groups.enable", "false", "--resume", "null"),
    *("--sync.mode", "drain"),
)
"""What the self-test sets over the recipe. Without filter the rounds cost the same whatever the model can do; requests
that run on would stand between the samples that are compared."""
TOLERANCE = {"float32": 1e-5}
"""Largest |Δ log-probability| of an engine whose weights did not change, in nats."""
TOLERANCE_REDUCED = 5e-2
"""The same in 16 bits, where kernels round differently from batch to batch."""
FLIPPED = 101
"""Of every so many elements of a tensor one changes its sign: exact to undo in every dtype, without a copy. A prime, so
that it is another column in each row; the change is a fifth of the tensor's norm, nats for a trained model."""
FOLLOWED = 0.1
"""Largest part of the mean gap to changed weights that may be left once they are published."""


_REMOVE_S = 10.0


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.found <= self.limit


def selftest(argv: Sequence[str]) -> int:
    """Runs the test on the options of launch/train.py and prints a table; 0: all passed, 1: something did not.

    Every rank calls it. Raises RecipeError for a wrong recipe. Nothing is left on disk, unless rank 0 is killed (SIGKILL).
    """
    from grpo_ds.train import Run

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    adopt_slurm(os.environ)
    recipe, bases = read_recipe([*argv, *STILL])
    run = Run()
    with scratch(Path(recipe.run.dir)) as folder:
        try:
            run.build(replace(recipe, run=replace(recipe.run, dir=str(folder))), bases)
            checks = _checks(run)
            mine = sum(not check.passed for check in checks)
            if run.ranks.is_main or mine:
                print(table(checks), flush=True)
            failed = run.ranks.all_gather(mine, "self-test")
            if not run.parity.passed:  # all ranks together: a diagnosis is collective
                run.log.say(f"{run.parity.report()}. {run.parity.diagnose()}")
        finally:
            run.close()
        run.ranks.barrier("self-test over")  # no node writes into the folder any more
    run.ranks.close()
    return int(sum(failed) > 0)


@contextmanager
def scratch(run_dir: Path) -> Iterator[Path]:
    """On rank 0 a hidden folder in run.dir, because all nodes see that one; it goes at the end, also after a failure.

    On other ranks run.dir itself: they write where rank 0 says.
    """
    if int(os.environ.get("RANK", "0")):
        yield run_dir
        return
    absent = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=".selftest-", dir=run_dir)
    except OSError as error:
        raise RecipeError(
            f"run.dir: no folder can be made in {run_dir} ({error.strerror}): name one that all nodes may write to"
        ) from None

    def end(name: str, code: int) -> None:
        _remove(made, absent)
        leave(code)

    on_end_request(end)  # launchers send rank 0 SIGTERM when another rank has failed
    try:
        yield Path(made)
    finally:
        _remove(made, absent)


def _remove(folder: str, parents: Sequence[Path]) -> None:
    """Again and again for some seconds: after a failure another node may still write its last lines there.

    parents: those that were made for it, the innermost first.
    """
    deadline = time.monotonic() + _REMOVE_S
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
    with suppress(OSError):  # somebody else has put something there
        for parent in parents:
            parent.rmdir()


def _checks(run: Any) -> list[Check]:
    """Probes, two rounds, changed weights, the old weights; a probe after each."""
    recipe, gate = run.recipe, run.parity
    weights, gaps, answers = _fingerprint(run), {"version 0": gate.measure(0)}, [gate.probe.answers]
    for version in _rounds(run):
        gaps[f"version {version}"] = gate.measure(version)
        answers.append(gate.probe.answers)
    version, changed, restored = recipe.train.rounds, "changed weights", "restored weights"
    _flip(run)
    apart = gate.measure(version)["parity/mean"]  # as the engine would be after a publication that loads nothing
    run.publisher.publish(version + 1)
    gaps[changed] = gate.measure(version + 1)
    _flip(run)
    run.publisher.publish(version + 2)
    gaps[restored] = gate.measure(version + 2)
    answers.append(gate.probe.answers)

    moved = sum(a != b for a, b in zip(weights, _fingerprint(run), strict=True))
    tokens, largest = zip(*(difference(answers[0], later) for later in answers[1:]), strict=True)
    exact = run.dtype == "float32"
    checks = [
        Check("trainer tensors whose bytes changed", moved, 0),
        Check("engine version - publications", _farthest(run.engine, version + 2), 0),
        Check("engine samples, same prompts and seeds: tokens that differ", sum(tokens), 0 if exact else float("inf")),
        Check("the same: max |Δ log-probability|", max(largest), TOLERANCE.get(run.dtype, TOLERANCE_REDUCED)),
        Check(f"{changed}: mean gap, published / not published", ratio(gaps[changed]["parity/mean"], apart), FOLLOWED),
    ]
    for when, gap in gaps.items():
        for name in ("max", "p99", "mean"):
            what = f"{when}: {name} |trainer - engine| log-probability"
            checks.append(Check(what, gap[f"parity/{name}"], getattr(gate.limits, name)))
    return checks


def _farthest(engine: Any, version: int) -> int:
    """How far the version that any server of this node reports is from the published one."""
    from grpo_ds.engine.pool import EnginePool

    if engine is None:
        return 0
    reported = engine.reported_versions() if isinstance(engine, EnginePool) else [engine.version()]
    return max(abs(found - version) for found in reported)


def _rounds(run: Any) -> Iterator[int]:
    """Runs one after the other; yields the version that it published."""
    from grpo_ds.loop import train

    recipe = run.recipe
    parts = replace(
        run.parts, parity=_NoGate(), evaluate=lambda done: {}, after_round=lambda done, version, metrics: None
    )
    # A gap above the limit is a line of the table here, not the end.
    lenient = replace(recipe, sync=replace(recipe.sync, max_logprob_gap=float("inf"), parity_every=0))
    for done in range(recipe.train.rounds):
        yield train(replace(lenient, train=replace(recipe.train, rounds=done + 1)), parts, done, done)


def _flip(run: Any) -> None:
    """Changes some signs in every tensor of the trainer; a second time it puts them back."""
    from grpo_ds.actor.backend import change_in_place

    params = [shard.param for shard in run.publisher.shards]
    change_in_place(params, lambda whole: whole.view(-1)[::FLIPPED].neg_())


def ratio(left: float, before: float) -> float:
    """left / before; infinite where nothing was there before, so that no check takes it for a success."""
    return left / before if before else float("inf")


class _NoGate:
    """In the place of the run's gate while the rounds are run."""

    def measure(self, version: int) -> dict[str, float]:
        raise AssertionError("sync.parity_every is 0")

    def require(self) -> None:
        pass


def difference(first: Answers, later: Answers) -> tuple[int, float]:
    """(tokens from the first differing one on, the largest |Δ log-probability| before it)."""
    tokens, largest = 0, 0.0
    for (_, one), (_, other) in zip(first, later, strict=True):
        ids, logprobs, other_ids, other_logprobs = one.token_ids, one.logprobs, other.token_ids, other.logprobs
        same = 0
        while same < min(len(ids), len(other_ids)) and ids[same] == other_ids[same]:
            same += 1
        tokens += max(len(ids), len(other_ids)) - same
        deltas = [abs(a - b) for a, b in zip(logprobs[:same], other_logprobs[:same], strict=True)]
        largest = max([largest, *deltas])
    return tokens, largest


def _fingerprint(run: Any) -> list[int]:
    """CRC-32 of this rank's part of each tensor."""
    import torch

    from grpo_ds.sync.receive import checksum

    parts = [shard.local(run.ranks.rank).contiguous().cpu() for shard in run.publisher.shards]
    return [checksum(memoryview(part.view(torch.uint8).numpy())) for part in parts]


def table(checks: Sequence[Check]) -> str:
    """One line a check."""
    width = max(len(check.what) for check in checks)
    rows = [f"\n{'':<{width}}  {'found':>9}  {'at most':>9}"]
    for c in checks:
        rows.append(f"{c.what:<{width}}  {c.found:>9.2g}  {c.limit:>9.2g}  {'passed' if c.passed else 'FAILED'}")
    failed = sum(not check.passed for check in checks)
    rows.append(
        f"selftest: {failed} of {len(checks)} checks failed"
        if failed
        else "selftest: nothing moved, and changed weights arrive"
    )
    return "\n".join(rows)


def main() -> int:
    """Exit code 0: passed, 1: failed, 2: wrong recipe."""
    end_with_launcher()
    try:
        return selftest(sys.argv[1:])
    except RecipeError as error:
        print(f"grpo-ds: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    leave(main())
