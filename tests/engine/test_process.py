"""No server outlives its owner, and a server that dies or cannot start is an error at once."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_ds.config import EngineConfig, RecipeError
from grpo_ds.engine.base import EngineDown, EngineError, SamplingSpec
from grpo_ds.engine.pool import EnginePool
from grpo_ds.engine.process import ServerProcess
from tests.engine.bench import Bench, assert_logprobs_match, make_model, new_engine, new_server, requests
from tests.engine.test_update import Sender, publish
from tests.models import save_model

# A server with a child that ignores SIGTERM and a child in a session of its own.
FAMILY = """
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""
# A server that ignores SIGTERM and holds a named semaphore, as SGLang's processes do; it prints the name.
HOLDER = """
import multiprocessing, signal, time
signal.signal(15, signal.SIG_IGN)
semaphore = multiprocessing.get_context("spawn").Semaphore()
print(semaphore._semlock.name, flush=True)
time.sleep(600)
"""
OWNER = """
import subprocess, sys, time
guard = subprocess.Popen([sys.executable, "-m", "grpo_ds.engine.guard", *sys.argv[1:]], stdin=subprocess.PIPE)
time.sleep(600)
"""
TRAINER = """
import sys, time
from pathlib import Path
from tests.engine.bench import new_server
engine = new_server("vllm", sys.argv[1], Path(sys.argv[2]))
engine.start()
time.sleep(600)
"""


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def gone(family: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in family)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def guarded(log: Path, *command: str) -> subprocess.Popen[bytes]:
    guard = [sys.executable, "-m", "grpo_ds.engine.guard", "--log", str(log), "--scratch", str(log.parent / "scratch")]
    return subprocess.Popen([*guard, "--", *command], stdin=subprocess.PIPE)


@pytest.mark.parametrize("how", ["close stdin", "SIGTERM", "SIGINT", "server dies"])
def test_the_guard_ends_the_servers_whole_family(tmp_path: Path, how: str) -> None:
    scratch = tmp_path / "scratch" / "deeper"
    scratch.mkdir(parents=True)
    with guarded(tmp_path / "log", sys.executable, "-c", FAMILY) as guard:
        wait_for("three processes", lambda: len(descendants(guard.pid)) == 3, 10)
        time.sleep(0.3)  # until the stubborn child ignores SIGTERM
        family = descendants(guard.pid)
        if how == "close stdin":
            assert guard.stdin is not None
            guard.stdin.close()
        elif how == "server dies":
            psutil.Process(guard.pid).children()[0].kill()
        else:
            guard.send_signal(getattr(signal, how))
        guard.wait(timeout=10)
        assert gone(family)
    assert not scratch.parent.exists()


def test_the_guard_ends_the_server_when_its_owner_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, "--log", str(tmp_path / "log"), "--", sys.executable, "-c", FAMILY]
    with subprocess.Popen(command) as owner:
        wait_for("guard and three processes", lambda: len(descendants(owner.pid)) == 4, 10)
        family = descendants(owner.pid)
        owner.kill()
        wait_for("the end of all", lambda: gone(family), 20)


def test_a_server_that_has_to_be_killed_leaves_no_semaphore(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with guarded(log, sys.executable, "-c", HOLDER) as guard:
        wait_for("the name of the semaphore", lambda: log.exists() and log.read_text().endswith("\n"), 20)
        semaphore = Path(f"/dev/shm/sem.{log.read_text().strip().removeprefix('/')}")
        assert semaphore.exists()
        guard.terminate()
        guard.wait(timeout=10)
    assert not semaphore.exists()


def test_the_guard_hands_on_output_and_exit_code(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    with guarded(tmp_path / "log", sys.executable, "-c", code) as guard:
        assert guard.wait(timeout=10) == 7
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(make_model(tied=True), tmp_path_factory.mktemp("model"))


def engine_core_runs(pid: int) -> bool:
    return any("EngineCore" in command_of(process) for process in descendants(pid))


def command_of(process: psutil.Process) -> str:
    """Empty for a process that has ended in the meantime."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest.fixture(scope="module")
def two_engines(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    engines: list[Any] = [new_server("vllm", model_path, tmp_path_factory.mktemp("vllm")) for _ in range(2)]
    for engine in engines:
        engine.start()
    yield engines
    for engine in engines:
        engine.close()


def test_a_server_killed_while_it_generates_costs_its_unanswered_requests_a_second_try(
    two_engines: list[Any],
) -> None:
    """The second server, started beside it, takes its place with the weights of the next publication."""
    engine, spares = two_engines[0], iter(two_engines)
    config = EngineConfig(max_restarts=1, start_timeout_s=600)
    pool: Any = EnginePool(lambda replica: next(spares), config)
    bench, sender, asked = Bench(pool, make_model(tied=True)), Sender(2**20), requests(64)
    pool.start()
    pool.wait_ready()
    guard, scratch = engine._server.process.pid, engine._server.process._scratch.path
    family = descendants(guard)
    sockets = {connection.laddr for process in family for connection in process.net_connections("unix")} - {""}
    assert sockets and all(str(path).startswith(f"{scratch}/") for path in sockets), sockets
    server = psutil.Process(guard).children()[0]
    assert len(family) >= 2, "the server runs the model in a process of its own"
    killed_at: list[float] = []

    def kill() -> None:
        server.kill()
        killed_at.append(time.monotonic())

    timer = threading.Timer(1.0, kill)
    timer.start()
    with pytest.raises(EngineDown) as down:
        pool.generate(asked, SamplingSpec(n=16, max_tokens=200))
    assert time.monotonic() - killed_at[0] < 2
    wait_for("the end of the server's processes", lambda: gone(family), 20)
    wait_for("the engine counted as dead", lambda: not engine.alive(), 2)
    wait_for("the end of its folder, with what a killed server leaves", lambda: not scratch.exists(), 20)
    publish(bench, sender, 7)  # waits for the second server
    os.close(sender.fd)
    rest = [request for request in asked if request.request_id not in down.value.finished]
    answers = pool.generate(rest, SamplingSpec(n=2, max_tokens=20))
    assert {span.version for row in answers for rollout in row for span in rollout.spans} == {7}
    for request, row in zip(rest, answers, strict=True):
        assert_logprobs_match(bench, request, row[1], 1.0)
    assert pool.take_counts() == {"quarantined": 1, "restarts": 1, "redone_requests": len(rest)}


def test_nothing_survives_a_killed_guard(two_engines: list[Any]) -> None:
    engine = two_engines[1]
    wait_for("vLLM's engine process", lambda: engine_core_runs(engine._server.process.pid), 200)
    family, scratch = descendants(engine._server.process.pid), engine._server.process._scratch.path
    timer = threading.Timer(0.5, os.kill, (engine._server.process.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(EngineError, match=r"(?s)p\d+.*vllm_server\.log|server died.*vllm_server\.log"):
        engine.generate(requests(64), SamplingSpec(n=16, max_tokens=200))
    wait_for("the end of the server's processes", lambda: gone(family), 20)
    engine.close()
    assert not scratch.exists()


def test_nothing_survives_a_killed_trainer(model_path: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAINER, model_path, str(tmp_path)]
    temporary = Path(tempfile.mkdtemp())  # pytest's own folder is too long for the name of a socket
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=env) as trainer:
        try:
            wait_for("vLLM's engine process", lambda: engine_core_runs(trainer.pid), 200)
            family = descendants(trainer.pid)
            assert list(temporary.glob("grpo-ds-*/*")), "the server has sockets"
        finally:
            trainer.kill()
        wait_for("the end of the server's processes", lambda: gone(family), 20)
        wait_for("an empty folder for temporary files", lambda: not list(temporary.iterdir()), 5)
    temporary.rmdir()


class Immortal:
    """A guard that SIGKILL does not end."""

    def __init__(self) -> None:
        self.pid, self.stdin, self.killed = 7, io.BytesIO(), False

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float) -> int:
        raise subprocess.TimeoutExpired("guard", timeout)


def test_a_guard_that_does_not_end_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    process: Any = ServerProcess("vLLM", lambda port: [], {}, tmp_path / "log", None, lambda line: False)
    guard = process._guard = Immortal()
    with pytest.raises(
        EngineError, match=r"process 7, the guard of the vLLM server, did not end within 15 s of SIGKILL"
    ):
        process.close()
    assert guard.killed and guard.stdin.closed


def test_vllms_own_complaint_about_an_option_reaches_the_user(model_path: str, tmp_path: Path) -> None:
    engine = new_server("vllm", model_path, tmp_path, args={"no_such_option": 3})
    engine.start()
    try:
        with pytest.raises(EngineError, match=r"(?s)exit code 2.*--no-such-option"):
            engine.wait_ready()
    finally:
        engine.close()
        engine.close()


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(RecipeError, match=f"engine.args.port is {port}"):
            new_engine("vllm", "m", tmp_path, args={"port": port})


def test_a_folder_for_temporary_files_without_room_for_sockets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 53
    for length in (longest, longest + 1):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
        if length == longest:
            new_engine("vllm", "m", tmp_path)
            continue
        with pytest.raises(RecipeError, match=f"TMPDIR: /t+ has {length} characters.* only {longest} here: set TMPDIR"):
            new_engine("vllm", "m", tmp_path)


def test_a_server_that_never_answers_is_given_up_with_its_address(tmp_path: Path) -> None:
    engine = new_server("vllm", "m", tmp_path, "http://127.0.0.1:9")
    engine.start()
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9 did not answer its health check within 0.3 s"):
        engine.wait_ready(timeout_s=0.3)


def test_an_unknown_kind_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'tgi', which does not exist: choose one of vllm, sglang, hf"):
        new_engine("tgi", "m", tmp_path)
