"""Starts the trainer as a user does, in processes of its own, and knows every process that came of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
START_S = 240.0
"""Deadline for a run to get where a test wants it; generous, because cores may be shared."""
END_S = 20.0
"""Deadline for all processes of a run to end once one of them is told to."""
_MARK = "GRPO_DS_E2E_RUN"
_STOPPED = "grpo_ds: stopped: "

REWARDS = '''
import os, time

def mixed(completions, **columns):
    """1 for an even number of digits; differs within most groups of a random model."""
    return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in completions]

def raises(completions, **columns):
    raise ValueError("no such answer")

def too_few(completions, **columns):
    return [0.0]

def hangs(completions, **columns):
    time.sleep(600)
'''
LOSSES = '''
import os
from dataclasses import dataclass, field
from grpo_ds.losses.policy import Vanilla

CALLS = []

@dataclass(frozen=True, kw_only=True)
class FailsOnRankOne(Vanilla):
    """Vanilla, but rank 1 raises in its third call."""

    def __call__(self, *args):
        CALLS.append(1)
        if os.environ["RANK"] == "1" and len(CALLS) == 3:
            raise ArithmeticError("the second rank has had enough")
        return super().__call__(*args)
'''
RECIPE = """
model: {path: model}
data: {train: train.jsonl, heldout: heldout.jsonl, max_prompt_tokens: 8}
reward: {functions: ["rewards.py:mixed"], workers: 1, dry_run_rows: 1}
rollout: {n: 4, max_response_tokens: 6, prompts_per_batch: 7}
engine: {kind: hf}
algorithm:
  filter_groups: {max_num_gen_batches: 4, max_staleness: 1, on_exhausted: train_partial}
actor: {lr: 1.0e-3, kl_loss_coef: 0.01}
train:
  {prompts_per_round: 4, rounds: 5, micro_batch_tokens: 64, checkpoint_every: 1, keep_checkpoints: 9, evaluate_every: 2}
run: {name: tiny}
"""
TRAIN_ROWS = 10


def write_project(folder: Path) -> Path:
    """A random model, ten prompts, rewards, a loss and a recipe; returns the recipe's path."""
    import torch

    from grpo_ds.demo import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    build_model(tokenizer, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{k}+{k + 1}=", "answer": str(2 * k + 1)} for k in range(11, 11 + TRAIN_ROWS + 4)]
    for name, part in (("train", rows[:TRAIN_ROWS]), ("heldout", rows[TRAIN_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "losses.py").write_text(LOSSES)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    return recipe


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(
    what: Callable[[], str], condition: Callable[[], object], timeout_s: float = START_S, poll_s: float = 0.05
) -> None:
    """Fails with what(), asked at the end, when the condition does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what()}"
        time.sleep(poll_s)


def command(launcher: str, arguments: Sequence[str], *, port: int | None = None) -> list[str]:
    """launcher: python (one rank), deepspeed or torchrun (two)."""
    port = port or free_port()
    heads = {
        "python": [sys.executable, TRAIN],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port), TRAIN],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port), TRAIN],
    }
    return [*heads[launcher], *arguments]


class Launched:
    """A run that was started in the folder `cwd`, with what it prints; ends whatever is left of it on exit."""

    def __init__(self, arguments: Sequence[str], cwd: Path, launcher: str = "python", port: int | None = None) -> None:
        self.cwd = cwd
        self._mark = uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()
        self._lines: list[str] = []
        self.shared: set[str] = set()
        """Files of /dev/shm that its processes used, where a test has looked."""
        # Nothing is fetched: a wrong name must not become a look-up on the network.
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", _MARK: self._mark}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
            env.pop(name, None)
        self.process = subprocess.Popen(
            command(launcher, arguments, port=port),
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line.rstrip("\n"))

    @property
    def screen(self) -> str:
        return "\n".join(self._lines)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        (found,) = (self.cwd / "runs").iterdir()
        return found

    def rounds(self) -> int:
        """Rounds in metrics.jsonl."""
        files = list((self.cwd / "runs").glob("*/metrics.jsonl"))
        return len(files[0].read_text().splitlines()) if files else 0

    def wait_for(self, what: str, condition: Callable[[], object], poll_s: float = 0.05) -> None:
        """Waits for something the run does, and says why when the run ends instead."""

        def reached() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.screen}"
            return False

        wait_for(lambda: f"{what}; the screen:\n{self.screen[-3000:]}", reached, poll_s=poll_s)

    # ---- processes ----

    def alive(self) -> list[psutil.Process]:
        """Every living process of the run, orphans included."""
        for process in psutil.process_iter():
            if process not in self._seen and _environ(process).get(_MARK) == self._mark:
                self._seen.add(process)
        with suppress(psutil.NoSuchProcess):
            self._seen.update(psutil.Process(self.process.pid).children(recursive=True))
        return [process for process in self._seen if _lives(process)]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        return self._one(
            lambda p: TRAIN in p.cmdline()[1:3] and _environ(p).get("RANK") == str(number)  # [2] after python -u
        )

    def server(self) -> psutil.Process:
        """vLLM's API server: the guard's first child."""
        return self._one(lambda p: "grpo_ds.engine.guard" in _cmd(p)).children()[0]

    def _one(self, wanted: Callable[[psutil.Process], bool]) -> psutil.Process:
        (found,) = [process for process in self.alive() if wanted(process)]
        return found

    def scratch(self) -> set[str]:
        """Folders for temporary files that the run's servers were given."""
        found = {_environ(process).get("TMPDIR", "") for process in self.alive()}
        return {path for path in found if "/grpo-ds-" in path}

    def shared_files(self) -> set[str]:
        """Files of /dev/shm that the run's processes have mapped or open."""
        paths: set[str] = set()
        for process in self.alive():
            paths |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
            paths |= {f.path for f in process.open_files() if f.path.startswith("/dev/shm/")}
        return paths

    def wait_for_exit(self) -> None:
        """Waits for the launcher's end."""
        wait_for(lambda: f"its end; the screen:\n{self.screen[-3000:]}", lambda: self.process.poll() is not None)

    def ends(self, timeout_s: float = END_S) -> int:
        """Waits until no process of the run is left and the screen is complete; returns the launcher's exit code."""
        wait_for(
            lambda: f"the end of all processes; left: {[(p.pid, _cmd(p)[:90]) for p in self.alive()]}",
            lambda: self.process.poll() is not None and not self.alive(),
            timeout_s,
        )
        self._reader.join(timeout=5)
        assert not self._reader.is_alive(), "somebody still holds the run's screen open"
        return self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends whatever is left of the run."""
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):  # it went with one of the others
                process.kill()
        self.process.wait()

    # ---- the last words ----

    def cause(self) -> str:
        """The sentence that stands last on the screen; there must be exactly one."""
        assert self.screen.count(_STOPPED) == 1, self.screen
        last = self.screen.rstrip().splitlines()[-1]
        assert last.startswith(_STOPPED), self.screen
        return last.removeprefix(_STOPPED)


def run(arguments: Sequence[str], cwd: Path, launcher: str = "python", port: int | None = None) -> Launched:
    """Starts a run, waits for its end and returns it; fails when a process of it stays behind."""
    with Launched(arguments, cwd, launcher, port) as launched:
        launched.wait_for_exit()
        launched.ends()
        return launched


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _cmd(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
