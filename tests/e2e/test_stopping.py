"""However a run is stopped, all of it ends, soon, with the cause on the last lines."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import END_S, Launched

ENDLESS = ["--train.rounds", "1000000", "--train.checkpoint_every", "0", "--run.rollouts_per_round", "0"]


def training(launched: Launched) -> None:
    """Waits until a round is done."""
    launched.wait_for("the first round", lambda: launched.rounds() >= 1)
    assert len(launched.alive()) >= 5, "two launchers, two ranks, a reward process"


def ended(launched: Launched) -> str:
    """Checks that the run failed and left nothing; returns the last lines of its screen."""
    left = {path for path in launched.shared if Path(path).exists()}
    assert not left, "left in shared memory, or of a server's temporary files"
    assert launched.process.returncode != 0
    return "\n".join(launched.screen.rstrip().splitlines()[-3:])


def hf_run(recipe: Path, tmp_path: Path, *extra: str, launcher: str = "deepspeed") -> Launched:
    return Launched(["--recipe", str(recipe), *ENDLESS, "--data.heldout", "null", *extra], tmp_path, launcher)


@pytest.mark.parametrize("how", ["SIGTERM to the launcher", "SIGINT to all", "rank 1 killed"])
def test_a_run_ends_whole(how: str, recipe: Path, tmp_path: Path) -> None:
    with hf_run(recipe, tmp_path) as launched:
        training(launched)
        launched.shared = launched.shared_files()
        if how == "SIGTERM to the launcher":
            launched.process.terminate()
        elif how == "SIGINT to all":
            os.killpg(launched.process.pid, signal.SIGINT)
        else:
            launched.rank(1).kill()
        launched.ends()
        lines = ended(launched)
    wanted = {
        "SIGTERM to the launcher": r"the launcher was ended from outside",
        "SIGINT to all": r"interrupted|received SIGINT",
        "rank 1 killed": r"stopped: .* failed at round \d+: a peer died|exits with return code = -9",
    }
    assert re.search(wanted[how], lines), launched.screen


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_an_exception_on_one_rank_ends_all_with_its_sentence(launcher: str, recipe: Path, tmp_path: Path) -> None:
    """Both launchers send SIGTERM to the other rank, which then must not speak for itself."""
    loss = f"{recipe.parent / 'losses.py'}:FailsOnRankOne"
    with hf_run(recipe, tmp_path, "--actor.policy_loss_fn", loss, launcher=launcher) as launched:
        launched.wait_for_exit()
        launched.ends()
        ended(launched)
    assert launched.cause() == "rank 1: ArithmeticError: the second rank has had enough"
    assert launched.rounds() >= 1, "it failed in the middle of the run"


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_its_ranks_with_a_sentence(recipe: Path, tmp_path: Path) -> None:
    with hf_run(recipe, tmp_path, launcher="torchrun") as launched:
        launched.wait_for("the first round", lambda: launched.rounds() >= 1)
        launched.process.terminate()
        launched.ends()
    assert re.search(r"sent this rank SIGTERM, which ends it|the launcher was ended from outside", launched.cause())


def test_sigterm_ends_a_run_of_plain_python_with_its_code_and_sentence(recipe: Path, tmp_path: Path) -> None:
    with hf_run(recipe, tmp_path, launcher="python") as launched:
        launched.wait_for("the first round", lambda: launched.rounds() >= 1)
        launched.process.terminate()
        assert launched.ends() == 143
    assert launched.cause() == "the run was sent SIGTERM, which ends it"


def test_sigterm_under_srun_is_a_request_for_a_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with hf_run(recipe, tmp_path, launcher="python") as launched:
        launched.wait_for("the first round", lambda: launched.rounds() >= 1)
        launched.process.terminate()
        assert launched.ends(2 * END_S) == 75
    (checkpoint,) = (launched.folder / "checkpoints").glob("round-*")
    assert re.fullmatch(r"on request, after round \d+; --resume auto goes on from .*", launched.cause())
    assert launched.cause().endswith(str(checkpoint))


VICTIMS = ("server", "rank 0", "launcher")
# Where the launcher hears of a killed rank before the other rank does, its own line is the cause.
ENDS = {
    "server": r"stopped: (EngineError|SyncError): .*",
    "rank 0": r"stopped: rank 1: .* failed at round \d+: a peer died|exits with return code = -9",
    "launcher": r"stopped: the launcher was ended from outside",
}


@pytest.fixture(scope="module")
def served(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Launched]]:
    """A run with a server of its own for each victim; the next one starts early, because a start takes long."""
    options = ["--engine.kind", "vllm", "--data.heldout", "null"]
    runs: dict[str, Launched] = {}

    def take(victim: str) -> Launched:
        wanted = VICTIMS[VICTIMS.index(victim) :][:2]
        for name in wanted:
            if name not in runs:
                cwd = tmp_path_factory.mktemp("served")
                runs[name] = Launched(["--recipe", str(recipe), *ENDLESS, *options], cwd, "deepspeed")
        return runs[victim]

    try:
        yield take
    finally:
        for launched in runs.values():
            launched.kill()


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_run_with_a_server_ends_whole(victim: str, served: Callable[[str], Launched]) -> None:
    launched = served(victim)
    training(launched)
    scratch = launched.scratch()
    assert len(scratch) == 1
    launched.shared = launched.shared_files() | scratch
    if victim == "server":
        launched.server().kill()
    elif victim == "rank 0":
        launched.rank(0).kill()
    else:
        launched.process.kill()
    launched.ends()
    assert re.search(ENDS[victim], ended(launched)), launched.screen
