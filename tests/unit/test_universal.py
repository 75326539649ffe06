"""The conversion of a checkpoint ends with the run, before the others lose patience, and its leftovers are harmless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from grpo_ds.actor import universal

MARK = "GRPO_DS_CONVERSION"
SLEEPS = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(300)'])"
"""Stands for DeepSpeed's converter, which has worker processes too."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints" / "round-000001"
    folder.mkdir(parents=True)
    return folder


def says(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Has this program run as the converter; its argument is the output folder."""
    command = lambda checkpoint, output: [sys.executable, "-S", "-c", program, str(output)]  # noqa: E731
    monkeypatch.setattr(universal, "_command", command)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that were started with it in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # it ended, or is somebody else's
    return found


def wait_until(count: int, mark: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while len(found := marked(mark)) != count:
        assert time.monotonic() < deadline, [process.cmdline() for process in found]
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_during_the_conversion_leaves_no_process(number: int, checkpoint: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from grpo_ds.actor import universal\n"
        f"universal._command = lambda *_: [sys.executable, '-S', '-c', {SLEEPS!r}]\n"
        f"universal.convert(Path({str(checkpoint)!r}), 600.0)\n"
    )
    mark = uuid.uuid4().hex
    env = os.environ | {MARK: mark}
    with subprocess.Popen([sys.executable, "-c", program], env=env, start_new_session=True) as run:
        try:
            wait_until(4, mark, 120.0)  # the run, the guard, the converter and its worker
            run.send_signal(number)
            run.wait(20)
            wait_until(0, mark, 20.0)
        finally:
            for process in marked(mark):
                process.kill()


def test_its_deadline_is_told_before_the_other_ranks_have_theirs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, SLEEPS)
    started = time.monotonic()
    told = universal.convert(checkpoint, 20.0)
    assert told == (
        "DeepSpeed's ds_to_universal did not end within 18 s (0.9 of the 20 s of train.collective_timeout_s)"
    )
    assert time.monotonic() - started < 20.0


def test_what_a_conversion_that_was_killed_has_left_is_removed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = checkpoint / "universal.0123abcd.partial"
    left.mkdir()
    says(monkeypatch, "import os, sys; os.mkdir(sys.argv[1]); open(sys.argv[1] + '/weights', 'w').write('w')")
    assert universal.convert(checkpoint, 100.0) is None
    assert [file.name for file in checkpoint.iterdir()] == ["universal"]
    assert (checkpoint / "universal" / "weights").read_text() == "w"


def test_two_conversions_never_write_into_one_folder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier one may still be ending."""
    says(monkeypatch, "import sys; print(sys.argv[1]); sys.exit(1)")
    first, second = (universal.convert(checkpoint, 100.0) for _ in range(2))
    assert first and second and first != second


def test_a_failure_is_told_in_the_converters_words(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "import sys; sys.exit('no space')")
    assert universal.convert(checkpoint, 100.0) == "DeepSpeed's ds_to_universal failed: no space"
    says(monkeypatch, "import sys; sys.exit('no rights')")
    assert universal.convert(checkpoint, 100.0) == "DeepSpeed's ds_to_universal failed: no rights"
