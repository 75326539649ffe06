"""Who counts as a launcher above a rank."""

import subprocess
import sys

import pytest

from grpo_ds.processes import _command, _is_launcher


@pytest.mark.parametrize(
    "command",
    [
        "/x/.venv/bin/python3 /x/.venv/bin/deepspeed --num_gpus 2 launch/train.py",
        "/x/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=e30= launch/train.py",
        "/x/bin/python /x/bin/torchrun --nproc-per-node 2 launch/train.py",
        "python -m torch.distributed.run launch/train.py",
        "python -um torch.distributed.launch launch/train.py",
        "python -X dev -W ignore -mtorch.distributed.run launch/train.py",
        "python /x/bin/ds launch/train.py",
        "python /x/site-packages/deepspeed/launcher/runner.py launch/train.py",
        "python3 deepspeed/launcher/launch.py launch/train.py",
        "python -u /x/site-packages/torch/distributed/run.py launch/train.py",
    ],
)
def test_python_running_a_launcher_is_one(command: str) -> None:
    assert _is_launcher(command.split())


@pytest.mark.parametrize("command", ["bash -c deepspeed launch/train.py &", "sh launch/quickstart.sh", "sshd: me", ""])
def test_a_shell_that_names_one_is_not(command: str) -> None:
    assert not _is_launcher(command.split())


@pytest.mark.parametrize(
    "command",
    [
        "/opt/conda/envs/deepspeed/bin/python -m ipykernel_launcher -f /run/kernel.json",
        "/home/u/deepspeed-rl/.venv/bin/python sweep.py",
        "python /home/u/deepspeed/sweep.py --launcher torchrun",
        "python /home/u/torch/distributed/sweep.py",
        "python -u sweep.py -m torch.distributed.run",
        "python -m sweep deepspeed",
        "python -m torch.utils.collect_env",
        "python",
    ],
)
def test_python_that_runs_something_else_is_not_whatever_it_is_called_with(command: str) -> None:
    """A notebook or a sweep that starts runs in the background may end before them."""
    assert not _is_launcher(command.split())


def test_words_are_not_looked_into() -> None:
    assert not _is_launcher(["python", "-c", "import os; os.system('deepspeed -m torch.distributed.run')"])
    assert not _is_launcher(["python", "my sweep of /bin/deepspeed runs.py"])
    assert _is_launcher(["/my folder/python", "/my folder/bin/deepspeed", "train.py"])


def test_the_command_line_of_a_live_process_is_read_word_by_word() -> None:
    words = [sys.executable, "-c", "print(flush=True); input()", "a b", ""]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        assert _command(process.pid) == words
        process.kill()
    assert _command(process.pid) == []
