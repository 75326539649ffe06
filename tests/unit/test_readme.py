"""The README's commands exist and parse; .ci/run executes the first two in full."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_the_two_commands_are_what_ci_runs() -> None:
    assert COMMANDS[:2] == ["bash launch/quickstart.sh", "bash launch/test.sh"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in COMMANDS[:2])


LAUNCHERS = ("deepspeed", "torchrun", "sbatch")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(LAUNCHERS)])
def test_every_training_command_resolves_to_a_recipe(command: str) -> None:
    launcher, *words = shlex.split(command)
    at = next(k for k, word in enumerate(words) if word.startswith("launch/") and not word.endswith("example"))
    assert words[at] == ("launch/slurm.sbatch" if launcher == "sbatch" else "launch/train.py")
    understood(launcher, words[: at + 1])
    done = subprocess.run(
        [sys.executable, "launch/train.py", *words[at + 1 :], "--print_config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    )
    assert done.returncode == 0, done.stderr
    assert "adv_estimator: grpo" in done.stdout


def understood(launcher: str, words: list[str]) -> None:
    """The launcher's own parser takes the options; sbatch's are those that the script's first lines show."""
    if launcher == "sbatch":
        head = (ROOT / words[-1]).read_text().split("#SBATCH")[0]
        assert all(word.partition("=")[0] in head for word in words)
    elif launcher == "deepspeed":
        found = runner.parse_args(words)
        assert found.user_script == words[-1] and not found.user_args
        assert not words[1:] or len(runner.parse_resource_filter(runner.fetch_hostfile(found.hostfile), "", "")) > 1
    else:
        found = get_args_parser().parse_args(words)
        assert found.training_script == words[-1] and not found.training_script_args


def test_every_launch_file_is_mentioned() -> None:
    text = (ROOT / "README.md").read_text()
    for file in (ROOT / "launch").iterdir():
        assert file.name in text or file.name.startswith(("constraints", "__pycache__")), file.name


def test_every_file_of_the_tree_exists() -> None:
    tree = (ROOT / "README.md").read_text().split("## Files")[1].split("```")[1]
    named = re.findall(r"\b([a-z_]+(?:\.py|/))", tree)
    places = [ROOT, ROOT / "grpo_ds", ROOT / "tests", ROOT / "launch", ROOT / "recipes"]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert named and not missing
