"""Signals end a process within seconds, with a cause and an exit code, even where its main thread waits in a library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# The main thread waits for ever in C code, as in a collective: Python's own handlers would never run.
PROGRAM = """
import ctypes, sys
from grpo_ds.ending import end_on_signal
from grpo_ds.processes import hold_stop_request, stop_requested

class Run:
    def close(self):
        print("closed", flush=True)
        {in_close}
    def after_lost_peer(self):
        return "nowhere"

hold_stop_request()
run = Run()
end_on_signal(run)
print("ready", flush=True)
{main}
"""
# The tests themselves may run under nohup.
HEARS = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
STUCK = "ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(32))"


@contextmanager
def started(main: str, in_close: str = "pass", **environ: str) -> Iterator[subprocess.Popen[str]]:
    env = {key: value for key, value in os.environ.items() if key != "RANK" and not key.startswith("SLURM")} | environ
    program = HEARS + PROGRAM.format(main=main, in_close=in_close)
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()  # where a test failed, nothing else ends it


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_stuck_run_ends_with_the_signals_code_and_the_sentence_last(name: str) -> None:
    with started(f"while True: {STUCK}") as process:
        process.send_signal(getattr(signal, name))
        asked = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + getattr(signal, name)
        assert time.monotonic() - asked < 5
    assert out == "closed\n" and err.splitlines()[-1] == f"grpo_ds: stopped: the run was sent {name}, which ends it"


def test_a_run_whose_parts_do_not_close_ends_all_the_same() -> None:
    patience = "import grpo_ds.ending; grpo_ds.ending._AFTER_SIGNAL_S = 1.0"
    with started(f"{patience}\nwhile True: {STUCK}", in_close="import time; time.sleep(600)") as process:
        process.terminate()
        assert process.wait(timeout=30) == 143


def test_what_the_main_thread_meets_while_a_signal_ends_the_run_is_not_the_cause() -> None:
    main = (
        "from grpo_ds import ending\n"
        "import time\n"
        "while not ending._ending.locked(): time.sleep(0.01)\n"
        "ending.end_after(run, ValueError('the engine is gone'))"
    )
    with started(main, in_close="import time; time.sleep(0.5)") as process:
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143
    assert err.splitlines()[-1] == "grpo_ds: stopped: the run was sent SIGTERM, which ends it"
    assert "the engine is gone" not in err


def test_nohup_is_respected() -> None:
    main = "import os, signal, time; os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.5); sys.exit(3)"
    ignore = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", ignore, sys.executable, "-c", PROGRAM.format(main=main, in_close="pass")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr


def test_under_srun_sigterm_asks_for_a_checkpoint_and_reaches_no_child() -> None:
    main = (
        "import os, signal, subprocess, time\n"
        "from multiprocessing import get_context\n"
        "get_context('spawn').Semaphore()\n"  # starts Python's resource tracker, which unblocks SIGTERM
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "assert not stop_requested()\n"
        "os.kill(os.getpid(), signal.SIGTERM); child.terminate(); time.sleep(0.3)\n"
        "assert stop_requested() and stop_requested()\n"
        "child.communicate(b'\\n', timeout=60)\n"
        "sys.exit(child.returncode)\n"
    )
    with started(main, SLURM_STEP_ID="0") as process:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err


@pytest.mark.parametrize(
    ("program", "codes"),
    [
        ("train.main([])", {0}),
        ("cli.run()", {0}),
        ("runpy.run_module('grpo_ds.doctor', {}, '__main__')", {0, 1}),  # it may find something wrong here
        ("runpy.run_module('grpo_ds.selftest', {}, '__main__')", {2}),  # no such option
    ],
)
def test_a_program_that_has_done_its_work_does_not_wait_for_what_may_abort_it(program: str, codes: set[int]) -> None:
    """Gloo's threads abort some processes while the interpreter is taken down; here that is certain."""
    main = (
        "import atexit, os, runpy\n"
        "from grpo_ds import cli, train\n"
        "Run.build = Run.train = lambda self, *given: None\n"
        "train.Run, train.read_recipe = Run, lambda argv: ()\n"
        "cli.main = lambda: 0\n"
        "sys.argv = ['doctor', '--timeout', '20']\n"
        "atexit.register(os.abort)\n"
        "print('finished', end='')\n"
        f"{program}"
    )
    with started(main, MASTER_ADDR="127.0.0.1") as process:
        out, err = process.communicate(timeout=120)
        assert process.returncode in codes, (out, err)
    assert out.startswith("finished")
