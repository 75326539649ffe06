"""Wrong input ends a run before it costs anything, with one sentence that stands last on the screen."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, Launched, run

Make = Callable[[Path], list[str]]
"""The arguments of a case, given a fresh folder that holds a copy of the project's small files."""


@dataclass(frozen=True)
class Case:
    name: str
    make: Make
    sentence: str
    """Regular expression for the whole cause."""
    code: int = 2


def option(*arguments: str) -> Make:
    return lambda folder: list(arguments)


def written(name: str, text: str, *arguments: str) -> Make:
    """A file in the folder, and arguments in which {} is its path."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_text(text)
        return [argument.replace("{}", str(folder / name)) for argument in arguments]

    return make


def model_without_tokenizer(folder: Path) -> list[str]:
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text('{"model_type": "qwen3"}')
    return ["--model.path", str(folder / "bare")]


# Answered from the recipe alone: no data is read, no torch imported.
RECIPE_CASES = [
    Case(
        "type",
        option("--actor.lr", "abc"),
        r"`actor\.lr` \(from .*tiny\.yaml or an option after it\): .*float.*, got `abc`",
    ),
    Case(
        "unknown option",
        option("--actor.lrr", "1"),
        r"command line: unknown key `actor\.lrr`; did you mean `actor\.lr`\?",
    ),
    Case(
        "unknown key",
        written("r.yaml", "actor: {learning_rate: 1}\n", "--recipe", "{}"),
        r".*r\.yaml: unknown key `actor\.learning_rate`; did you mean `actor\..*`\?",
    ),
    Case(
        "broken YAML",
        written("r.yaml", "model: {path: x\ndata: 1\n", "--recipe", "{}"),
        r".*r\.yaml: not valid YAML: .*line 2, column \d+.*",
    ),
    Case(
        "unknown recipe",
        option("--recipe", "quikstart"),
        r"--recipe quikstart: no such file, and recipes/ has only: .*quickstart\.yaml.*",
    ),
    Case(
        "a group of one",
        option("--rollout.n", "1"),
        r".*algorithm\.filter_groups\.enable needs rollout\.n >= 2: the scores of a single response never differ",
    ),
    Case(
        "nucleus sampling with importance weights",
        option("--rollout.top_p", "0.9"),
        r".*rollout\.top_p and rollout\.top_k must be off while algorithm\.importance\.level is not off.*set "
        r"algorithm\.importance\.level: off, or sample from the full distribution",
    ),
    Case(
        "aggregation",
        option("--actor.loss_agg_mode", "mean"),
        r"`actor\.loss_agg_mode` \(from .*\): .*token-mean.*, got `mean`",
    ),
]
# Found in the data and by trying the reward functions, before torch is imported.
DATA_CASES = [
    Case(
        "no data file",
        option("--data.train", "no.jsonl"),
        r"data\.train: there is no file 'no\.jsonl' \(tried .*\); correct the path",
    ),
    Case(
        "row without prompt",
        written("rows.jsonl", '{"prompt": "1+1="}\n{"question": "2+2="}\n', "--data.train", "{}"),
        r"data\.train: .*rows\.jsonl, row 1 has no column 'prompt' \(found: question\); add it, or name the right column "
        r"with data\.columns: \{prompt: \.\.\.\}",
    ),
    Case(
        "reward raises",
        option("--reward.functions", '["rewards.py:raises"]'),
        r"RewardError: reward raises raised ValueError: no such answer \(.*rewards\.py:\d+\) on .*row 0.*; correct the "
        r"function, or set reward\.on_error: unscored to leave such samples out",
        1,
    ),
    Case(
        "reward returns too few",
        option("--reward.functions", '["rewards.py:too_few"]'),
        r"RewardError: reward too_few returned 1 values for 2 completions; return one number or None a completion",
        1,
    ),
    Case(
        "reward hangs",
        option("--reward.functions", '["rewards.py:hangs"]', "--reward.timeout_s", "0.5"),
        r"RewardError: reward hangs missed its deadline of 0\.5 s \(reward\.timeout_s\) on .*row 0.*",
        1,
    ),
    Case(
        "no such reward",
        option("--reward.functions", '["aritmetic"]'),
        r"reward\.functions: no reward is called 'aritmetic', did you mean 'arithmetic'\?.*",
    ),
]
# Need torch and DeepSpeed, but no weights.
SETTING_CASES = [
    Case(
        "batch size in DeepSpeed's file",
        written("ds.json", '{"train_batch_size": 8, "zero_optimization": {"stage": 3}}', "--actor.deepspeed", "{}"),
        r".*ds\.json: remove `train_batch_size`: it is set by the recipe \(train\.prompts_per_round and rollout\.n\)",
    ),
    Case(
        "estimator",
        option("--algorithm.adv_estimator", "grop"),
        r"no estimator is called 'grop', did you mean 'grpo'\?.*",
    ),
    Case(
        "loss",
        option("--actor.policy_loss_fn", "vanila"),
        r"no policy loss is called 'vanila', did you mean 'vanilla'\?.*",
    ),
    Case("KL", option("--actor.kl_loss_type", "k4"), r"no KL estimate is called 'k4'.*\(there are: k1, .*\)"),
    Case(
        "no tokenizer",
        model_without_tokenizer,
        r"model\.path: no tokenizer could be loaded from .*bare \(.*\): put tokenizer\.json and "
        r"tokenizer_config\.json into the folder",
    ),
    Case(
        "no model",
        option("--model.path", "/no/such/model"),
        r"model\.path: there is no folder /no/such/model: correct the path, or give a hub name",
    ),
    Case(
        "attention",
        option("--model.attn_implementation", "sdpaa"),
        r"model\.attn_implementation: sdpaa cannot be used here \(.*\): choose sdpa or eager, or install .*",
    ),
    Case(
        "engine", option("--engine.kind", "tgi"), r"engine\.kind is 'tgi', which does not exist: choose one of .*vllm.*"
    ),
]


def refused(case: Case, recipe: Path, tmp_path: Path, launcher: str = "python", port: int | None = None) -> Launched:
    """Runs the case in an empty folder and checks all but the sentence."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    done = run(["--recipe", str(recipe), *case.make(tmp_path)], cwd, launcher, port)
    assert done.process.returncode == case.code, done.screen
    assert list(cwd.iterdir()) == [], "a refused run leaves no folder"
    assert re.fullmatch(case.sentence, done.cause()), done.cause()
    return done


@pytest.mark.parametrize("case", RECIPE_CASES, ids=lambda case: case.name)
def test_a_wrong_recipe_is_refused_at_once(case: Case, recipe: Path, tmp_path: Path) -> None:
    done = refused(case, recipe, tmp_path)
    assert len(done.screen.split()) == len(done.cause().split()) + 2, "nothing else is on the screen"


@pytest.mark.parametrize("case", DATA_CASES, ids=lambda case: case.name)
def test_wrong_data_or_rewards_are_refused_before_torch_loads(case: Case, recipe: Path, tmp_path: Path) -> None:
    assert "accelerator" not in refused(case, recipe, tmp_path).screen


@pytest.fixture(scope="session")
def two_at_a_time(
    request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Launched]]]:
    """The slower cases that were asked for; importing DeepSpeed keeps one core busy for seconds."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params["slow"].name for spec in chosen if spec is not None and "slow" in spec.params}
    with ThreadPoolExecutor(2) as pool:
        yield {
            case.name: pool.submit(refused, case, recipe, tmp_path_factory.mktemp("case"))
            for case in SETTING_CASES
            if case.name in names
        }


@pytest.mark.parametrize("slow", SETTING_CASES, ids=lambda case: case.name)
def test_wrong_settings_are_refused_before_a_model_loads(
    slow: Case, two_at_a_time: dict[str, Future[Launched]]
) -> None:
    assert "Loading weights" not in two_at_a_time[slow.name].result(timeout=280).screen


def test_a_taken_engine_port_is_refused_before_a_run_has_a_folder(recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        arguments = option("--engine.kind", "vllm", "--engine.args", json.dumps({"port": port}))
        sentence = rf"engine\.args\.port is {port}, which cannot be used \(.*\): give another port, or none"
        refused(Case("port", arguments, sentence), recipe, tmp_path)


def test_under_the_launcher_a_typing_mistake_is_told_once_and_last(recipe: Path, tmp_path: Path) -> None:
    shipped = str(ROOT / "recipes" / "quickstart.yaml")
    sentence = r"`actor\.lr` \(from .*quickstart\.yaml or an option after it\): .*, got `abc`"
    done = refused(
        Case("type", option("--recipe", shipped, "--actor.lr", "abc"), sentence), recipe, tmp_path, "deepspeed"
    )
    assert done.screen.count("got `abc`") == 1


def test_under_the_launcher_a_failing_reward_is_told_last(recipe: Path, tmp_path: Path) -> None:
    case = next(case for case in DATA_CASES if case.name == "reward raises")
    refused(case, recipe, tmp_path, "deepspeed")


def test_a_taken_master_port_is_told_with_the_launchers_option(recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        sentence = (
            rf"DistError: MASTER_PORT {port} is taken by another program on this machine: start with another one .*"
        )
        refused(Case("port", option(), sentence, 1), recipe, tmp_path, "deepspeed", port)
