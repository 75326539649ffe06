"""The README's commands exist and parse; .ci/run executes the first two in full."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_the_two_commands_are_what_ci_runs() -> None:
    assert COMMANDS[:2] == ["bash launch/quickstart.sh", "bash launch/test.sh"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in COMMANDS[:2])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("deepspeed")])
def test_every_training_command_resolves_to_a_recipe(command: str) -> None:
    words = shlex.split(command)
    assert words[:2] == ["deepspeed", "launch/train.py"]
    done = subprocess.run(
        [sys.executable, *words[1:], "--print_config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    )
    assert done.returncode == 0, done.stderr
    assert "adv_estimator: grpo" in done.stdout


def test_every_file_of_the_tree_exists() -> None:
    tree = (ROOT / "README.md").read_text().split("## Files")[1].split("```")[1]
    named = re.findall(r"\b([a-z_]+(?:\.py|/))", tree)
    places = [ROOT, ROOT / "grpo_ds", ROOT / "tests", ROOT / "launch", ROOT / "recipes"]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert named and not missing
