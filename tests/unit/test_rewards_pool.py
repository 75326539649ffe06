"""`RewardPool` with real processes: each way in which a reward function can fail, and that no process survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_ds.config import RecipeError, RewardConfig
from grpo_ds.rewards import RewardError, RewardPool
from grpo_ds.types import Prompt, Rollout, VersionSpan

FUNCTIONS = """
import os, re, time

def length(completions, **columns):
    return [float(len(c)) for c in completions]

def raises(completions):
    if any(c.startswith("bad") for c in completions):
        raise KeyError("no tag")
    return [1.0] * len(completions)

def hangs(completions):
    while "hang" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)

def stuck_in_c(completions):
    if "hang" in completions:
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        re.match(r"(a+)+$", "a" * 60 + "b")
    return [1.0] * len(completions)

def dies(completions):
    if "die" in completions:
        os._exit(7)
    return [1.0] * len(completions)

def exits(completions):
    raise SystemExit(3)

def too_few(completions):
    return [1.0] * (len(completions) - 1)

def nan(completions):
    return [float("nan") if c == "bad" else 0.0 for c in completions]

def nothing(completions):
    return [None if c == "skip" else 1.0 for c in completions]

def slow(completions):
    time.sleep(0.7 * len(completions))
    return [float(len(completions))] * len(completions)

def together(completions):
    if "bad" in completions:
        raise ValueError("bad among " + str(len(completions)))
    return [float(len(completions))] * len(completions)

def quarrel(completions):
    if len(completions) > 1:
        raise ValueError("more than one")
    return [1.0]

class Target:
    def __init__(self, length: int = 0, scale: float = 1.0) -> None:
        self.length, self.scale = length, scale

    def __call__(self, completions, **columns):
        return [self.scale * (len(c) - self.length) for c in completions]

def roles(completions):
    return [1.0 if c == [{"role": "assistant", "content": "hi"}] else 0.0 for c in completions]

def environment(completions):
    clean = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ and os.environ["OMP_NUM_THREADS"] == "1"
    return [float(clean)] * len(completions)
"""

PARENT = """
import sys, time
from pathlib import Path
from grpo_ds.config import RewardConfig
from grpo_ds.rewards import RewardPool

if __name__ == "__main__":
    pool = RewardPool(RewardConfig(functions=["mine.py:hangs"], timeout_s=100.0), [Path(sys.argv[1])])
    pool.score(["p"], ["fine"], [[1]], {})
    print(*pool.pids(), flush=True)
    pool.score(["p"], ["hang"], [[1]], {})
"""

DEADLINE_S = 1.5
"""For calls that must miss it, among others that must not, on a busy machine too."""

MakePool = Callable[..., RewardPool]


@pytest.fixture
def make_pool(tmp_path: Path) -> Iterator[MakePool]:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    made: list[RewardPool] = []

    def make(*functions: str, **settings: Any) -> RewardPool:
        specs = [f if "." in f or f == "arithmetic" else f"mine.py:{f}" for f in functions]
        made.append(
            RewardPool(RewardConfig(functions=specs, **{"timeout_s": 5.0, "workers": 1, **settings}), [tmp_path])
        )
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def score(pool: RewardPool, *completions: str, **columns: list[Any]) -> list[dict[str, float | None]]:
    count = len(completions)
    return pool.score(["p"] * count, list(completions), [[1]] * count, columns, list(range(100, 100 + count)))[0]


def prompt(index: int) -> Prompt:
    return Prompt(index=index, row=index, token_ids=(1,), text="p", columns={})


def rollout(text: str) -> Rollout:
    return Rollout(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", spans=(VersionSpan(0, 0, 1),), text=text)


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_values_come_back_in_order_over_several_chunks_and_functions(make_pool: MakePool) -> None:
    pool = make_pool("length", "arithmetic", workers=2)
    completions = ["x" * (n % 5) + str(n) for n in range(40)]
    parts = score(pool, *completions, answer=list(range(40)))
    assert parts == [
        {"length": float(len(c)), "arithmetic": 1.0 if n % 5 == 0 else 0.0} for n, c in enumerate(completions)
    ]
    stats = pool.take_stats()
    assert (stats["length"].samples, stats["length"].unscored) == (40, 0)
    assert pool.take_stats()["length"].samples == 0


def test_a_function_that_raises_ends_the_run_with_the_sample_and_the_reason(make_pool: MakePool) -> None:
    long = "bad" + "y" * 200
    with pytest.raises(RewardError) as caught:
        score(make_pool("raises"), "fine", long, "fine")
    message = str(caught.value)
    assert "reward raises raised KeyError: 'no tag'" in message
    assert "mine.py:9" in message
    assert f"prompt row 101, completion {long[:80]!r};" in message


def test_only_the_guilty_sample_is_left_unscored(make_pool: MakePool) -> None:
    pool = make_pool("raises", on_error="unscored")
    assert [p["raises"] for p in score(pool, "a", "bad", "b")] == [1.0, None, 1.0]
    stats = pool.take_stats()["raises"]
    assert (stats.samples, stats.unscored, stats.errors, stats.timeouts) == (3, 1, 1, 0)


def test_a_hanging_sample_is_killed_and_the_others_are_scored(make_pool: MakePool) -> None:
    pool = make_pool("hangs", on_error="unscored", timeout_s=DEADLINE_S)
    assert [p["hangs"] for p in score(pool, "a", "hang", "b")] == [1.0, None, 1.0]
    stats = pool.take_stats()["hangs"]
    assert (stats.unscored, stats.errors, stats.timeouts) == (1, 0, 1)
    assert [p["hangs"] for p in score(pool, "a")] == [1.0]


def test_a_hang_ends_the_run_with_the_deadline_and_the_sample(make_pool: MakePool) -> None:
    with pytest.raises(RewardError, match=r"hangs missed its deadline of 1\.5 s .*row 101, completion 'hang'"):
        score(make_pool("hangs", timeout_s=DEADLINE_S), "a", "hang")


def test_a_function_that_blocks_sigterm_inside_c_code_is_killed_too(make_pool: MakePool) -> None:
    pool = make_pool("stuck_in_c", on_error="unscored", timeout_s=DEADLINE_S)
    assert [p["stuck_in_c"] for p in score(pool, "hang")] == [None]
    assert [p["stuck_in_c"] for p in score(pool, "a")] == [1.0]


def test_a_function_that_ends_its_process_is_found(make_pool: MakePool) -> None:
    with pytest.raises(RewardError, match="dies ended its process with exit code 7 on prompt row 102"):
        score(make_pool("dies"), "a", "b", "die")
    pool = make_pool("dies", on_error="unscored")
    assert [p["dies"] for p in score(pool, "a", "die", "b")] == [1.0, None, 1.0]
    with pytest.raises(RewardError, match="raised SystemExit: 3"):
        score(make_pool("exits"), "a")


def test_wrong_results_end_the_run_even_when_failures_are_left_out(make_pool: MakePool) -> None:
    with pytest.raises(RewardError, match="reward too_few returned 3 values for 4 completions"):
        score(make_pool("too_few", on_error="unscored"), "a", "b", "c", "d")
    with pytest.raises(RewardError, match="reward nan returned nan, .*prompt row 101, completion 'bad'"):
        score(make_pool("nan", on_error="unscored"), "a", "bad")


def test_none_is_no_error_and_is_counted(make_pool: MakePool) -> None:
    pool = make_pool("nothing")
    assert [p["nothing"] for p in score(pool, "a", "skip")] == [1.0, None]
    assert pool.take_stats()["nothing"].unscored == 1


def test_a_function_too_slow_for_the_deadline_of_one_sample_still_gets_whole_groups(make_pool: MakePool) -> None:
    pool = make_pool("slow", timeout_s=DEADLINE_S, workers=2)
    # 2.8 s together and 0.7 s alone: the call of all four is made again, with four deadlines.
    assert [p["slow"] for p in score(pool, *"abcd")] == [4.0] * 4
    begin = time.monotonic()
    assert [p["slow"] for p in score(pool, *"efgh")] == [4.0] * 4
    assert time.monotonic() - begin < 2.8 + DEADLINE_S, "the next call has the longer deadline from the start"
    stats = pool.take_stats()["slow"]
    assert (stats.timeouts, stats.unscored) == (0, 0)
    assert stats.p95_call_s == pytest.approx(2.8, abs=1.0)


def test_a_call_holds_the_responses_of_one_prompt_and_all_of_them(make_pool: MakePool) -> None:
    groups = make_pool("together", workers=2).score_groups(
        [(prompt(k), [rollout("x")] * size) for k, size in enumerate((3, 1, 40))], max_response_tokens=4
    )
    assert [[m.score for m in g.members] for g in groups] == [[3.0] * 3, [1.0], [40.0] * 40]


def test_the_innocent_of_a_failed_group_are_scored_together(make_pool: MakePool) -> None:
    pool = make_pool("together", on_error="unscored")
    assert [p["together"] for p in score(pool, "a", "bad", "b", "c")] == [3.0, None, 3.0, 3.0]
    stats = pool.take_stats()["together"]
    assert (stats.errors, stats.unscored) == (1, 1)


def test_a_group_that_fails_only_together_is_named_as_such(make_pool: MakePool) -> None:
    with pytest.raises(
        RewardError, match=r"quarrel raised ValueError: more than one .* on 2 responses together, on none"
    ):
        score(make_pool("quarrel"), "a", "b")
    pool = make_pool("quarrel", on_error="unscored")
    assert [p["quarrel"] for p in score(pool, "a", "b")] == [None, None]
    assert pool.take_stats()["quarrel"].errors == 2


def test_the_first_reasons_of_a_run_are_shown_once_each(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool("raises", on_error="unscored")
    for text in ("bad", "bad", "worse"):
        score(pool, text)
    shown = [record.getMessage() for record in caplog.records]
    assert len(shown) == 1
    assert "reward raises raised KeyError: 'no tag' (" in shown[0] and "prompt row 100, completion 'bad'" in shown[0]
    state = pool._functions[0]
    for number in range(9):
        state.left_out(f"raised number {number}", "row 1")
    assert len(caplog.records) == 3


def test_the_options_of_a_class_come_from_the_recipe_and_are_checked(make_pool: MakePool) -> None:
    options = {"Target": {"length": 2, "scale": 0.5}}
    assert score(make_pool("Target", "length", function_args=options), "abcde") == [{"Target": 1.5, "length": 5.0}]
    with pytest.raises(RecipeError, match="has no option 'lenght', did you mean 'length'"):
        score(make_pool("Target", function_args={"Target": {"lenght": 2}}), "a")
    with pytest.raises(RecipeError, match="option 'length' is 'two' .str., it must be int"):
        score(make_pool("Target", function_args={"Target": {"length": "two"}}), "a")
    with pytest.raises(RecipeError, match="has no option 'x' .it takes: none"):
        score(make_pool("length", function_args={"length": {"x": 1}}), "a")
    with pytest.raises(RecipeError, match="function_args names .Targte., which is no reward function: is it .Target."):
        make_pool("Target", function_args={"Targte": {}})


def test_messages_in_the_prompt_make_messages_of_the_completion(make_pool: MakePool) -> None:
    prompts = [[{"role": "user", "content": "p"}], "p"]
    parts, _ = make_pool("roles").score(prompts, ["hi", "hi"], [[1], [1]], {})
    assert [p["roles"] for p in parts] == [1.0, 0.0]


def test_the_processes_do_not_believe_to_be_ranks(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert score(make_pool("environment"), "a") == [{"environment": 1.0}]


def test_a_function_that_cannot_be_loaded_is_a_mistake_of_the_recipe(make_pool: MakePool, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    with pytest.raises(RecipeError, match=r"importing .*broken\.py failed with ModuleNotFoundError: .*broken\.py:1\)"):
        score(make_pool("broken.py:f"), "a")
    with pytest.raises(RecipeError, match="has no attribute 'absent'"):
        score(make_pool("absent"), "a")


def test_a_module_that_hangs_while_it_is_imported_is_not_waited_for_without_end(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stuck.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setattr("grpo_ds.rewards.scoring.START_S", 0.5)
    with pytest.raises(RewardError, match=r"answered none of 1 calls within 1 s .*on import"):
        score(make_pool("stuck.py:f", timeout_s=0.5), "a")


def test_a_column_with_the_name_of_a_keyword_is_refused(make_pool: MakePool) -> None:
    with pytest.raises(RecipeError, match=r"'prompts' has the name of a reward keyword; rename it"):
        make_pool("length").score(["p"], ["a"], [[1]], {"prompts": ["q"]})


@pytest.mark.parametrize(
    ("function", "message"),
    [("exits", "raised SystemExit"), ("too_few", "returned 1 values for 2"), ("hangs_always", "missed its deadline")],
)
def test_the_dry_run_finds_functions_that_cannot_work(
    make_pool: MakePool, tmp_path: Path, function: str, message: str
) -> None:
    with (tmp_path / "mine.py").open("a") as file:
        file.write("\ndef hangs_always(completions):\n    time.sleep(100)\n")
    with pytest.raises(RewardError, match=message):
        make_pool(function, timeout_s=DEADLINE_S).dry_run(["p", "q", "r"], [{"answer": 1}] * 3)


def test_the_dry_run_allows_failures_that_the_recipe_allows_but_not_only_failures(make_pool: MakePool) -> None:
    with pytest.raises(RewardError, match="exits failed on all 4 samples"):
        make_pool("exits", on_error="unscored").dry_run(["p", "q"], [{}, {}])
    pool = make_pool("arithmetic", on_error="unscored")
    pool.dry_run(["p", "q"], [{"answer": 1}, {"answer": 2}])
    assert pool.take_stats()["arithmetic"].samples == 0


def test_groups_carry_parts_score_and_shaped_reward(make_pool: MakePool) -> None:
    pool = make_pool("length", "arithmetic", weights=[1.0, 10.0], overlong_buffer_len=2)
    prompts = [
        Prompt(index=n, row=n, token_ids=(1,), text="p", columns={"answer": a} if a else {})
        for n, a in enumerate([7, 0])
    ]
    outs = [
        Rollout(token_ids=(1,) * n, logprobs=(0.0,) * n, finish_reason="stop", spans=(VersionSpan(0, 0, n),), text=text)
        for n, text in [(1, "7"), (3, "55"), (4, "")]
    ]
    groups = pool.score_groups([(prompts[0], outs[:2]), (prompts[1], outs[2:])], max_response_tokens=4)
    assert [g.prompt.index for g in groups] == [0, 1]
    # Penalty with L_max 4, B 2: 1 token 0, 3 tokens -0.5, 4 tokens -1. Row 1 has no answer: that part is None.
    assert [(m.score, m.reward) for g in groups for m in g.members] == [(11.0, 11.0), (2.0, 1.5), (0.0, -1.0)]
    assert groups[1].members[0].parts == {"length": 0.0, "arithmetic": None}


def test_processes_that_die_between_calls_are_replaced(make_pool: MakePool) -> None:
    pool = make_pool("length")
    score(pool, "a")
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGKILL)
    assert score(pool, "ab") == [{"length": 2.0}]


def test_no_process_remains_after_close_even_from_a_call_that_hangs(make_pool: MakePool) -> None:
    pool = make_pool("hangs", workers=2, timeout_s=100.0)
    score(pool, *["a"] * 40)
    pids = pool.pids()
    assert len(pids) == 2
    pool._processes.submit(time.sleep, (100,), 100.0)
    time.sleep(0.3)
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 50, "the call takes 100 s"
    assert gone(pids, within_s=0)


def test_no_process_remains_after_the_parent_was_killed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not gone(pids, within_s=0)
        time.sleep(0.3)  # one of them hangs in its call now
        parent.kill()
        ended = gone(pids, within_s=50)
    for pid in [] if ended else pids:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    assert ended
