"""The simulator of tests/benchmarks, on rounds small enough to be worked out by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.simulator import (
    Constants,
    best_dedicated,
    colocated,
    dedicated,
    draw,
    engine_seconds,
    fit,
    line_fit,
    network_gb_s,
    read_lengths,
    sync_seconds,
    table,
)

# Two slots; a step takes 1 s and 0.5 s more a running sequence; training 10 s and 1 s a token; publication 3 s and bytes.
C = Constants(
    slots=2,
    step_s=1.0,
    step_sequence_s=0.5,
    train_fixed_s=10.0,
    train_token_s=1.0,
    sync_fixed_s=3.0,
    model_gb=8.0,
    network_gb_s=4.0,
    memory_gb_s=2.0,
)


@pytest.mark.parametrize(
    ("lengths", "seconds"),
    [
        ([3], 3 * 1.5),
        ([3, 1], 1 * 2.0 + 2 * 1.5),  # two run for a step, then one for two
        ([4, 2, 2], 4 * 2.0),  # the third takes the place of the second: two run all the time
        ([1, 1, 1], 1 * 2.0 + 1 * 1.5),
        ([], 0.0),
    ],
)
def test_an_engine_refills_its_slots_and_waits_for_its_longest_sequence(lengths: list[int], seconds: float) -> None:
    assert engine_seconds(lengths, C) == pytest.approx(seconds)


def test_a_publication_is_what_arrives_over_the_network_and_one_copy() -> None:
    assert sync_seconds(1, C, servers=0) == pytest.approx(3 + 0 + 8 / 2)
    assert sync_seconds(4, C, servers=0) == pytest.approx(3 + 8 * 3 / 4 / 4 + 8 / 2)
    assert sync_seconds(4, C, servers=1) == pytest.approx(3 + (8 * 3 / 4 + 8) / 4 + 8 / 2)
    assert sync_seconds(4, C, servers=3) == pytest.approx(3 + (8 * 3 / 4 + 24) / 4 + 8 / 2), "one broadcast a server"


def test_colocated_nodes_wait_for_the_slowest_one() -> None:
    """Nodes get [4, 2] and [1, 1]: 2 steps of 2 s and 2 of 1.5 s, against one of 2 s.

    Training: 10 + 8 / 2 = 14 s. Publication: 3 + 8 / 2 / 4 + 4 = 8 s. The second node idles for 5 of 29 s.
    """
    found = colocated([4, 1, 2, 1], 2, C)
    assert found.seconds == pytest.approx(7 + 14 + 8)
    assert found.idle == pytest.approx(5 / (2 * 29))
    assert colocated([4, 1, 2, 1], 2, C, tokens=28).seconds == pytest.approx(7 + 24 + 8)


def test_dedicated_nodes_take_turns_or_work_ahead() -> None:
    """One engine node: [4, 2, 1, 1] is 4 steps of 2 s. One trainer: 10 + 8 = 18 s. Publication: 3 + 2 + 4 = 9 s."""
    turns = dedicated([4, 2, 1, 1], 2, 1, C, ahead=False)
    assert turns.seconds == pytest.approx(8 + 18 + 9)
    assert turns.idle == pytest.approx((18 + 8) / (2 * 35))
    ahead = dedicated([4, 2, 1, 1], 2, 1, C, ahead=True)
    assert ahead.seconds == pytest.approx(18 + 9)
    assert ahead.idle == pytest.approx(10 / (2 * 27)), "the engine node waits for the trainer"


def test_a_trainer_sends_the_model_to_each_of_its_engine_nodes() -> None:
    """One trainer and three engine nodes of [4]: 4 steps of 1.5 s, 10 + 12 s, and 3 + 3 x 8 / 4 + 4 s."""
    found = dedicated([4, 4, 4], 4, 3, C, ahead=False)
    assert found.seconds == pytest.approx(6 + 22 + 13)


def test_the_best_split_is_the_one_with_the_shortest_round() -> None:
    generation_heavy = replace(C, train_fixed_s=0.0, train_token_s=0.0, model_gb=0.0)
    assert best_dedicated([4] * 64, 8, generation_heavy, ahead=False)[0] == 7
    training_heavy = replace(C, step_s=0.0, step_sequence_s=0.0, model_gb=0.0)
    assert best_dedicated([4] * 64, 8, training_heavy, ahead=False)[0] == 4, "each trainer has an engine node"
    assert best_dedicated([4] * 64, 2, training_heavy, ahead=False)[0] == 1


def test_several_engines_of_a_node_share_its_sequences() -> None:
    two = replace(C, engines=2)
    assert colocated([4, 4, 4, 4], 1, C).seconds - colocated([4, 4, 4, 4], 1, two).seconds == pytest.approx(8.0)


def test_drawn_lengths_have_the_median_and_never_exceed_the_longest() -> None:
    c = replace(C, median_tokens=100.0, tail=1.0, longest_tokens=300)
    lengths = sorted(draw(4001, c, random.Random(0), []))
    assert lengths[2000] == pytest.approx(100, rel=0.1)
    assert lengths[-1] == 300 and lengths[0] >= 1
    assert set(draw(50, c, random.Random(0), [7, 9])) == {7, 9}


def test_constants_come_from_a_runs_files(tmp_path: Path) -> None:
    """Rounds 2 and 3 count: 3 + 5 lockstep steps took 4 s, so a step 0.5 s; training took 2 s + 0.25 s a token."""
    (tmp_path / "rollouts").mkdir()
    lengths = {0: [[9, 9]], 1: [[9, 9]], 2: [[1, 2], [1, 1]], 3: [[4, 1], [1, 1]]}
    rows = []
    for number, groups in lengths.items():
        records = [
            {"round": number, "prompt_index": prompt, "tokens": tokens}
            for prompt, group in enumerate(groups)
            for tokens in group
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "rollouts" / f"round-{number:06d}-node-0.jsonl").write_text(text)
        tokens = sum(sum(group) for group in groups)
        steps = sum(max(group) for group in groups)
        seconds = {"generation": 0.5 * steps, "sync": 0.125, "sync_write": 0.0625, "sync_wait": 0.03125}
        total = 0.5 * steps + 2.0 + 0.25 * tokens + 0.125
        rows.append({"round": number, "tokens_trained": tokens, "seconds/total": total})
        rows[-1] |= {"tokens_generated": tokens + 5, "baseline_tokens": 5}
        rows[-1] |= {f"seconds/{name}": value for name, value in seconds.items()}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(bytes(1500))

    assert read_lengths(tmp_path, by_group=True)[3] == [4, 1]
    assert read_lengths(tmp_path, by_group=False)[2] == [1, 2, 1, 1]
    found = fit([tmp_path], replace(C, slots=1), by_group=True)
    assert (found.step_s, found.train_fixed_s, found.train_token_s, found.sync_fixed_s) == pytest.approx(
        (0.5, 2.0, 0.25, 0.03125)
    )
    assert (found.model_gb, found.memory_gb_s) == pytest.approx((1.5e-6, 1.5e-6 / 0.09375))
    assert sync_seconds(1, found, servers=0) == pytest.approx(0.125)
    slower = replace(found, memory_gb_s=2 * found.memory_gb_s)
    assert network_gb_s(tmp_path, slower) == pytest.approx(0.75e-6 / (0.09375 / 2)), "the other half of the time"

    last = tmp_path / "rollouts" / "round-000003-node-0.jsonl"
    last.write_text("".join(last.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit, match=r"round 3 generated 7 tokens and rollouts/ has 6: .* run.rollouts_per_round"):
        read_lengths(tmp_path, by_group=True)


def test_a_line_never_predicts_less_than_nothing() -> None:
    assert line_fit([1.0, 2.0], [3.0, 5.0]) == pytest.approx((1.0, 2.0))
    assert line_fit([1.0, 2.0], [1.0, 4.0]) == pytest.approx((0.0, 5 / 3))
    assert line_fit([2.0, 2.0], [3.0, 5.0]) == (4.0, 0.0)


def test_the_table_has_a_line_for_each_number_of_nodes() -> None:
    lines = list(table(C, 16, 2, [3, 5]))
    assert [int(line.split()[0]) for line in lines[2:]] == [1, 2, 4, 8, 16, 32, 64]
