"""Who counts as a launcher above a rank."""

import pytest

from grpo_ds.processes import _is_launcher


@pytest.mark.parametrize(
    "command",
    [
        "/x/.venv/bin/python3 /x/.venv/bin/deepspeed --num_gpus 2 launch/train.py",
        "/x/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=e30= launch/train.py",
        "/x/bin/python /x/bin/torchrun --nproc-per-node 2 launch/train.py",
        "python -m torch.distributed.run launch/train.py",
    ],
)
def test_python_running_a_launcher_is_one(command: str) -> None:
    assert _is_launcher(command)


@pytest.mark.parametrize("command", ["bash -c deepspeed launch/train.py &", "sh launch/quickstart.sh", "sshd: me", ""])
def test_a_shell_that_names_one_is_not(command: str) -> None:
    assert not _is_launcher(command)
