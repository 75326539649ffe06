"""Step time and idle share for 1 to 64 nodes, simulated: python tests/benchmarks/simulator.py [--run FOLDER] [--compare]

    (no option)    a table for the constants of `Constants` and the options that replace them
    --run FOLDER   takes response lengths, step times, the model's size and the speed of its copies from a run on one
                   node that wrote all its responses (run.rollouts_per_round); --network-gb-s stays as given
    --compare      runs the real trainer on this machine as one node with two loads and takes the constants from these,
                   the network's from a run as two virtual nodes, and compares predictions with further runs as one
                   node and as two with another load

A round is generation, training and weight publication. What is simulated event by event is generation: an engine has
so many slots, a decode step gets slower with every running sequence, and a sequence leaves when it has its length; the
longest one keeps the whole cluster waiting. Training is balanced by tokens, so it needs no events. Three layouts:

    colocated   each node generates its share, then all train; the engines' GPUs are the trainer's
    dedicated   some nodes only generate, the others only train, in turn
    ahead       as dedicated, but the engines generate the next round meanwhile (sync.mode keep or abort)

Bytes of a publication of a model of M bytes between N training nodes: colocated, every node fetches M (N - 1) / N and
copies M into its memory; dedicated, a training node's lead besides sends M to each of its k engine nodes, k M in all.
A training node needs an engine node at least, so no more than half of the nodes train.
Not modelled: collectives inside training that get slower with more nodes, failures, filtered groups that are redone.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

NODES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Constants:
    """What is measured once. The defaults are a guess for 70B on nodes of 8 GPUs, to be replaced by measurements."""

    median_tokens: float = 4000.0
    """Median response length; the tail is log-normal."""
    tail: float = 1.0
    """Standard deviation of the logarithm of the length."""
    longest_tokens: int = 32768
    engines: int = 1
    """Engines a node."""
    slots: int = 256
    """Sequences an engine runs at once."""
    step_s: float = 0.03
    """A decode step of one engine, however few sequences run."""
    step_sequence_s: float = 0.0002
    """What each running sequence adds to it."""
    train_fixed_s: float = 20.0
    """A node's training time in a round that does not depend on the tokens (log-probabilities included)."""
    train_token_s: float = 0.0002
    """What each token adds to it, on one node."""
    sync_fixed_s: float = 1.0
    model_gb: float = 140.0
    network_gb_s: float = 40.0
    """Of a node, each way."""
    memory_gb_s: float = 20.0
    """Of a node's copies into shared memory, and of its engine's out of it; they run side by side."""


@dataclass(frozen=True)
class Round:
    """One simulated round."""

    seconds: float
    idle: float
    """Share of the node-seconds in which a node neither generates nor trains nor publishes."""


def engine_seconds(lengths: Sequence[int], c: Constants) -> float:
    """Seconds in which one engine generates sequences of these lengths; a free slot takes the next one at once."""
    waiting = list(reversed(lengths))
    running: list[int] = []  # by the decode step at which each one is done
    seconds, tick = 0.0, 0
    while waiting or running:
        while waiting and len(running) < c.slots:
            heapq.heappush(running, tick + waiting.pop())
        done = running[0]
        seconds += (done - tick) * (c.step_s + c.step_sequence_s * len(running))
        tick = done
        while running and running[0] == tick:
            heapq.heappop(running)
    return seconds


def node_seconds(lengths: Sequence[int], nodes: int, c: Constants) -> list[float]:
    """Generation time of each node; a node's sequences are dealt to its engines like the nodes' to them."""
    shares = [lengths[k::nodes] for k in range(nodes)]
    return [max(engine_seconds(share[e :: c.engines], c) for e in range(c.engines)) for share in shares]


def sync_seconds(training_nodes: int, c: Constants, *, servers: int) -> float:
    """Duration of a publication; servers: engine nodes that one training node sends to (0: colocated)."""
    over_network = c.model_gb * ((training_nodes - 1) / training_nodes + servers)
    return c.sync_fixed_s + over_network / c.network_gb_s + c.model_gb / c.memory_gb_s


def train_seconds(tokens: int, nodes: int, c: Constants) -> float:
    return c.train_fixed_s + c.train_token_s * tokens / nodes


def colocated(lengths: Sequence[int], nodes: int, c: Constants, tokens: int | None = None) -> Round:
    """tokens: what is trained on where that is not the sum of lengths."""
    generating = node_seconds(lengths, nodes, c)
    tokens = sum(lengths) if tokens is None else tokens
    together = train_seconds(tokens, nodes, c) + sync_seconds(nodes, c, servers=0)
    seconds = max(generating) + together
    return Round(seconds, 1 - (sum(generating) + nodes * together) / (nodes * seconds))


def dedicated(lengths: Sequence[int], nodes: int, engine_nodes: int, c: Constants, *, ahead: bool) -> Round:
    trainers = nodes - engine_nodes
    generating = node_seconds(lengths, engine_nodes, c)
    train = train_seconds(sum(lengths), trainers, c)
    sync = sync_seconds(trainers, c, servers=math.ceil(engine_nodes / trainers))
    seconds = (max(max(generating), train) if ahead else max(generating) + train) + sync
    return Round(seconds, 1 - (sum(generating) + trainers * train + nodes * sync) / (nodes * seconds))


def best_dedicated(lengths: Sequence[int], nodes: int, c: Constants, *, ahead: bool) -> tuple[int, Round]:
    """The number of engine nodes with the shortest round, of eighths of the nodes; every trainer has one at least."""
    choices = sorted({nodes * k // 8 for k in range(1, 8)} & set(range((nodes + 1) // 2, nodes)) or {nodes - 1})
    rounds = [(e, dedicated(lengths, nodes, e, c, ahead=ahead)) for e in choices]
    return min(rounds, key=lambda found: found[1].seconds)


def draw(count: int, c: Constants, rng: random.Random, measured: Sequence[int]) -> list[int]:
    """Lengths of `count` responses: drawn from the measured ones, or from the log-normal tail."""
    if measured:
        return rng.choices(measured, k=count)
    mu = c.median_tokens
    return [max(1, min(c.longest_tokens, round(mu * rng.lognormvariate(0.0, c.tail)))) for _ in range(count)]


def table(c: Constants, responses: int, rounds: int, measured: Sequence[int]) -> Iterator[str]:
    """Lines of the table: means over simulated rounds of `responses` responses; every layout sees the same ones."""
    rng = random.Random(0)
    batches = [draw(responses, c, rng, measured) for _ in range(rounds)]
    yield f"{responses} responses a round, seconds a round and idle share (in brackets: engine nodes)"
    yield f"{'nodes':>5}  {'colocated':>16}  {'dedicated':>22}  {'ahead':>22}"
    for nodes in NODES:
        cells = [_cell([colocated(batch, nodes, c) for batch in batches])]
        for ahead in (False, True) if nodes > 1 else ():
            engine_nodes, _ = best_dedicated(batches[0], nodes, c, ahead=ahead)
            found = [dedicated(batch, nodes, engine_nodes, c, ahead=ahead) for batch in batches]
            cells.append(f"{_cell(found)} ({engine_nodes:>2})")
        yield f"{nodes:>5}  {cells[0]:>16}  " + "  ".join(f"{cell:>22}" for cell in cells[1:])


def _cell(rounds: Sequence[Round]) -> str:
    return f"{statistics.mean(r.seconds for r in rounds):9.2f} {statistics.mean(r.idle for r in rounds):6.1%}"


# ---- constants from runs ----


def read_rounds(run: Path) -> list[dict[str, Any]]:
    """A run's metrics without its first two rounds, which make connections and fill caches."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows[min(2, len(rows) - 1) :]


def read_lengths(run: Path, *, by_group: bool) -> dict[int, list[int]]:
    """Response lengths of each round, in tokens; by_group: the longest of each group, where groups run in lockstep.

    Ends the program where a round's files hold fewer tokens than it generated.
    """
    groups: dict[int, dict[int, list[int]]] = {}
    for file in sorted((run / "rollouts").glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            groups.setdefault(row["round"], {}).setdefault(row["prompt_index"], []).append(row["tokens"])
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        written = sum(n for members in groups.get(row["round"], {}).values() for n in members)
        generated = row["tokens_generated"] - row["baseline_tokens"]
        if written != generated:
            raise SystemExit(
                f"{run}: round {row['round']} generated {generated:g} tokens and rollouts/ has {written}: start a run with "
                "a run.rollouts_per_round no smaller than the responses of a node's round"
            )
    return {
        number: [n for members in of_round.values() for n in ([max(members)] if by_group else members)]
        for number, of_round in sorted(groups.items())
    }


def line_fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of the least squares line, neither below 0; all-equal xs give slope 0."""
    if len(set(xs)) < 2:
        return statistics.mean(ys), 0.0
    slope, intercept = statistics.linear_regression(xs, ys)
    return (intercept, max(0.0, slope)) if intercept >= 0 else (0.0, sum(ys) / sum(xs))


def fit(runs: Sequence[Path], c: Constants, *, by_group: bool) -> Constants:
    """Constants of one-node runs with this engine's slots; a decode step counts the same for any number of sequences.

    What the network carries is not seen there: network_gb_s stays.
    """
    rows = [row for run in runs for row in read_rounds(run)]
    training = [row["seconds/total"] - row["seconds/generation"] - row["seconds/sync"] for row in rows]
    fixed, per_token = line_fit([float(row["tokens_trained"]) for row in rows], training)
    one_s = replace(c, step_s=1.0, step_sequence_s=0.0)
    steps = 0.0
    for run in runs:
        lengths = read_lengths(run, by_group=by_group)
        steps += sum(engine_seconds(lengths[row["round"]], one_s) for row in read_rounds(run))
    return replace(
        c,
        step_s=sum(row["seconds/generation"] for row in rows) / steps,
        step_sequence_s=0.0,
        train_fixed_s=fixed,
        train_token_s=per_token,
        sync_fixed_s=statistics.median(row["seconds/sync"] - copying(row) for row in rows),
        model_gb=model_gb(runs[0]),
        memory_gb_s=model_gb(runs[0]) / statistics.median(map(copying, rows)),
    )


def copying(row: dict[str, Any]) -> float:
    """Seconds of a round's publication in which weights were on their way."""
    return float(row["seconds/sync_write"] + row["seconds/sync_wait"])


def model_gb(run: Path) -> float:
    """Of the weights that the run published, which it also exported."""
    return sum(file.stat().st_size for file in (run / "hf").glob("*.safetensors")) / 1e9


def network_gb_s(run: Path, c: Constants) -> float:
    """From a run on two nodes, each of which fetches half of the model, beside what copying takes on one."""
    seconds = statistics.median(map(copying, read_rounds(run))) - c.model_gb / c.memory_gb_s
    return c.model_gb / 2 / max(seconds, 1e-6)


def all_lengths(run: Path, *, by_group: bool) -> list[int]:
    return [n for lengths in read_lengths(run, by_group=by_group).values() for n in lengths]


# ---- comparison with the real trainer ----

_LOADS = (6, 12)
_OTHER_LOAD = 20
_OPTIONS = {
    "rollout.n": 4,
    "rollout.max_response_tokens": 64,
    "algorithm.filter_groups.enable": "false",
    "train.rounds": 10,
    "train.micro_batch_tokens": 1024,
    "train.checkpoint_every": 0,
    "actor.lr": 0.0,
    "data.heldout": "null",
    "run.rollouts_per_round": 1000,
}


def real_run(recipe: Path, folder: Path, nodes: int, prompts: int) -> Path:
    """The folder of a run on `nodes` virtual nodes of one rank, each with the engine hf."""
    from tests.dist.harness import free_port

    folder.mkdir()
    options = _OPTIONS | {"train.prompts_per_round": prompts, "rollout.prompts_per_batch": prompts}
    words = [str(ROOT / "launch" / "train.py"), "--recipe", str(recipe)]
    words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    shared = {"WORLD_SIZE": str(nodes), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with open(folder / "screen", "w") as screen:
        ranks = [
            subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=os.environ | shared | {"RANK": str(k)},
                stdout=screen,
                stderr=screen,
            )
            for k in range(nodes)
        ]
        codes = [rank.wait(timeout=600) for rank in ranks]
    if any(codes):
        raise SystemExit(f"the run ended with {codes}:\n{(folder / 'screen').read_text()[-3000:]}")
    (run,) = (folder / "runs").iterdir()
    return run


def compare(folder: Path) -> Iterator[str]:
    """Lines: prediction and measurement for one node and for two, with a load on which nothing was fitted."""
    from tests.e2e.harness import write_project

    (folder / "project").mkdir()
    recipe = write_project(folder / "project")
    known = [real_run(recipe, folder / f"load-{prompts}", 1, prompts) for prompts in _LOADS]
    c = fit(known, Constants(slots=1), by_group=True)
    yield f"fitted on one node, {_LOADS} prompts a round: decode step {c.step_s * 1e3:.2f} ms, training and rewards"
    yield f"{c.train_fixed_s * 1e3:.0f} ms + {c.train_token_s * 1e6:.1f} us a token, sync {c.sync_fixed_s * 1e3:.1f} ms and"
    c = replace(c, network_gb_s=network_gb_s(real_run(recipe, folder / "network", 2, _LOADS[0]), c))
    yield f"{c.model_gb * 1e3:.1f} MB at {c.memory_gb_s:.2f} GB/s; from two nodes: network {c.network_gb_s:.3f} GB/s"
    longest = [n for run in known for n in all_lengths(run, by_group=True)]
    tokens = round(_OTHER_LOAD * 4 * statistics.mean(n for run in known for n in all_lengths(run, by_group=False)))
    rng = random.Random(0)
    for nodes in (1, 2):
        simulated = [colocated(rng.choices(longest, k=_OTHER_LOAD), nodes, c, tokens) for _ in range(300)]
        predicted = statistics.mean(r.seconds for r in simulated)
        rows = read_rounds(real_run(recipe, folder / f"nodes-{nodes}", nodes, _OTHER_LOAD))
        measured = statistics.mean(row["seconds/total"] for row in rows)
        idle = statistics.mean(r.idle for r in simulated)
        generation, sync = (statistics.mean(row[f"seconds/{name}"] for row in rows) for name in ("generation", "sync"))
        yield (
            f"{nodes} node(s), {_OTHER_LOAD} prompts: predicted {predicted:.3f} s a round (idle {idle:.1%}, sync "
            f"{sync_seconds(nodes, c, servers=0):.3f}), measured {measured:.3f} s, of which generation {generation:.3f}, "
            f"sync {sync:.3f}: {predicted / measured - 1:+.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Constants):
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar=kind.__name__
        )
    parser.add_argument("--responses", type=int, default=8192, help="responses a round (default: 512 x 16)")
    parser.add_argument("--rounds", type=int, default=3, help="simulated rounds a line")
    parser.add_argument("--run", type=Path, help="folder of a run on one node to take lengths and times from")
    parser.add_argument("--compare", action="store_true", help="predictions against real runs on this machine")
    args = parser.parse_args()
    if args.compare:
        with tempfile.TemporaryDirectory() as folder:
            for line in compare(Path(folder)):
                print(line, flush=True)
        return
    constants = Constants(**{field.name: getattr(args, field.name) for field in fields(Constants)})
    measured: list[int] = []
    if args.run:
        constants = fit([args.run], constants, by_group=False)
        measured = all_lengths(args.run, by_group=False)
    print(constants)
    for line in table(constants, args.responses, args.rounds, measured):
        print(line)


if __name__ == "__main__":
    main()
