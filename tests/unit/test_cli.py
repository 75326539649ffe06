"""The command grpo-ds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ds import __version__
from grpo_ds.cli import main
from grpo_ds.conformance import PROPERTIES
from grpo_ds.plugin_list import GROUPS, plugin_help
from grpo_ds.plugins import list_plugins

BROKEN = """
def flips(token_rewards, response_mask, group_index):
    "Writes into its input."
    token_rewards.neg_()
    return token_rewards * response_mask, token_rewards * response_mask
"""


def test_plugins_lists_every_group_with_source_needs_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    text = capsys.readouterr().out
    for group in GROUPS:
        for row in list_plugins(group):
            assert f"  {row.name}  [grpo_ds {__version__}]" in text
    grpo = text.partition("  grpo  [")[2].partition("\n  grpo_")[0]
    assert "norm_by_std: bool (default True)  Divide by the group's standard deviation." in grpo
    gdpo = text.partition("  gdpo  [")[2].partition("\n  gpg")[0]
    assert "needs: whole_batch, per_function_rewards, unshaped_rewards\n" in gdpo
    assert "needs: min_group_size 2\n" in text.partition("  grpo_passk  [")[2].partition("\n  grpo_v")[0]


def test_plugins_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "rewards"]) == 0
    text = capsys.readouterr().out
    assert "gsm8k" in text and "vanilla" not in text


def test_check_estimator_prints_a_line_a_property(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-estimator", "grpo", "--option", "singleton=zero", "--option", "eps=1e-5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == list(PROPERTIES)
    assert all(line.endswith("passed") for line in lines[:-1])
    assert lines[-1] == "grpo: all hold"


def test_check_estimator_tries_as_many_reward_functions_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-estimator", "gdpo", "--option", "weights=[1, 2, 3]", "--functions", "3"]) == 0
    assert main(["check-estimator", "gdpo", "--option", "weights=[1, 2, 3]"]) == 1
    assert "gdpo has 3 weights for 2 reward functions" in capsys.readouterr().out


def test_check_estimator_ends_with_1_and_names_what_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    assert main(["check-estimator", f"{tmp_path}/mine.py:flips"]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failures) == 2, "it modifies its input, and lets NaN through"
    assert failures[1].startswith("inputs not modified") and failures[1].endswith("token_rewards was changed in place")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check-estimator", "grpoo"], "grpo-ds: no estimator is called 'grpoo', did you mean 'grpo'?"),
        (["check-estimator", "grpo", "--option", "ddof"], "grpo-ds: --option ddof: write KEY=VALUE"),
        (["check-estimator", "grpo", "--option", "ddof=3"], "option 'ddof' is 3 (int), it must be Literal[0, 1]"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_help_of_the_trainer_shows_the_options_of_every_plugin_of_every_group() -> None:
    text = plugin_help()
    assert "algorithm.estimator_args" in text and "norm_by_std: bool (default True)" in text
    assert "actor.policy_loss_args" in text and "dual_clip: float | None (default None)" in text
    assert "algorithm.filter_groups.filter_args" in text and "tolerance: float (default 0.0)" in text
    for group in GROUPS:
        for row in list_plugins(group):
            assert f"  {row.name}  [" in text.partition(f"{group} (")[2].partition("\n\n")[0]


def test_asking_for_help_imports_no_torch() -> None:
    probe = (
        "import sys\nfrom grpo_ds.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("False\n") and "check-estimator" in done.stdout
