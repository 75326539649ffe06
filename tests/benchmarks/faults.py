"""Random faults in a real run: python tests/benchmarks/faults.py [--rounds 30] [--faults 20] [--seed 0]

One rank, two vLLM servers. At random moments the API process of a server or the process that runs its model is killed
(SIGKILL) or stopped (SIGSTOP), or the latter gets no memory any more (RLIMIT_AS at what it has). A server that still
starts is only killed. Prints each fault with its time, then checks that the run finished and met every fault, that every
prompt that was drawn is answered once and trained, dropped or left over once, and that every token has its round's policy
version.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from grpo_ds.engine.base import KEY_VARIABLE  # noqa: E402
from tests.e2e.harness import Launched, read_jsonl, wait_for, write_project  # noqa: E402
from tests.engine.test_replicas import OPTIONS, guard_command  # noqa: E402

N = int(str(OPTIONS["rollout.n"]))
START_S = 240
"""engine.start_timeout_s: a server that is stopped while it starts is given up only then."""
LONGER = {"rollout.max_response_tokens": 96, "rollout.prompts_per_batch": 32, "train.prompts_per_round": 24}
"""Rounds that last a while, because a server needs much longer to come back than a round of so small a model."""
QUIET_S = 3 * START_S
"""Seconds without a round and without a fault after which the run counts as stuck."""


def starve(process: psutil.Process) -> None:
    """Lets the process have no more memory than it has."""
    _, hard = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, hard))


FAULTS = {"kill": psutil.Process.kill, "suspend": psutil.Process.suspend, "starve": starve}


def break_one(run: Launched, rng: random.Random, broken: set[psutil.Process]) -> str:
    """Breaks one process of one server that was not broken before; says which, or an empty string where none is up.

    broken: guards of the servers that were.
    """
    guards = [process for process in run.alive() if guard_command(process) and process not in broken]
    up = [guard for guard in sorted(guards, key=lambda guard: guard.pid) if guard.children()]
    if not up:
        return ""
    ready = [guard for guard in up if is_ready(guard.children()[0])]
    guard = rng.choice(ready if ready and rng.random() < 0.8 else up)
    api, *others = guard.children(recursive=True)
    # The third one, its resource tracker, is no part of the server that anybody would miss.
    core = [process for process in others if "EngineCore" in " ".join([process.name(), *process.cmdline()])]
    how = rng.choice(sorted(FAULTS)) if guard in ready else "kill"
    # The API process needs no new memory for what it does each round.
    victim = core[0] if how == "starve" else rng.choice([api, *core[:1]])
    said = (
        f"{how} {'API' if victim == api else 'model'} process {victim.pid}{'' if guard in ready else ', which starts'}"
    )
    FAULTS[how](victim)
    broken.add(guard)
    return said


def is_ready(api: psutil.Process) -> bool:
    """Whether the server answers its health check."""
    words = api.cmdline()
    key = {"Authorization": f"Bearer {api.environ()[KEY_VARIABLE]}"}
    try:
        url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/health"
        return httpx.get(url, headers=key, timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def inject(run: Launched, rng: random.Random, faults: int, rounds: int) -> int:
    """Breaks servers until `faults` faults were made or the run ended; returns how many were."""
    begin, done = time.monotonic(), 0
    progress, moved = (0, 0), begin
    broken: set[psutil.Process] = set()
    while run.process.poll() is None and done < faults:
        if progress != (done, run.rounds()):
            progress, moved = (done, run.rounds()), time.monotonic()
        assert time.monotonic() - moved < QUIET_S, f"round {run.rounds()} takes over {QUIET_S} s:\n{run.screen[-3000:]}"
        # Spread over the run: fault k waits for its share of the rounds, then for a random moment.
        # The last rounds are spare, because a round may take less than the moment.
        if run.rounds() < done * (rounds - 8) / faults or run.rounds() < 1:
            time.sleep(0.2)
            continue
        time.sleep(rng.uniform(0, 1.5))
        try:
            said = break_one(run, rng, broken)
        except psutil.NoSuchProcess:
            continue  # it ended in the meantime
        if said:
            done += 1
            print(f"{time.monotonic() - begin:7.1f} s  round {run.rounds():2d}  fault {done:2d}: {said}", flush=True)
        else:
            time.sleep(1)
    return done


def judge(folder: Path, rounds: int, faults: int, met: int) -> list[str]:
    """What is wrong with the finished run; empty when nothing is. met: failures that the run spoke of."""
    metrics = read_jsonl(folder / "metrics.jsonl")
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "rollouts").glob("*.jsonl")):
        rows += read_jsonl(path)
    seen = Counter((row["prompt_index"], row["sample"]) for row in rows)
    end = folder / "checkpoints" / f"round-{rounds:06d}"
    state = json.loads((end / "trainer.json").read_text())
    fates = len(read_jsonl(end / "carried-0.jsonl"))
    fates += sum(row["kept_groups"] + row["dropped_groups"] for row in metrics)
    wrong = []
    if met < faults:
        wrong.append(f"{faults} faults, and the run met only {met}")
    if [row["round"] for row in metrics] != list(range(rounds)):
        wrong.append(f"rounds: {[row['round'] for row in metrics]}")
    if set(seen) != {(prompt, k) for prompt in range(state["cursor"]) for k in range(N)} or set(seen.values()) != {1}:
        wrong.append(f"of {state['cursor']} prompts drawn, a response is missing or there twice")
    if fates != state["cursor"]:
        wrong.append(f"{state['cursor']} prompts drawn, {fates} groups trained, dropped or left over")
    if bad := [row for row in rows if row["versions"] != [[row["round"], 0, row["tokens"]]]]:
        wrong.append(f"{len(bad)} responses were not made by their round's policy: {bad[0]['versions']}")
    for name in ("engine/quarantined", "engine/restarts", "engine/redone_requests"):
        print(f"{name}: {sum(row[name] for row in metrics)}")
    print(f"prompts: {state['cursor']}; responses: {len(rows)}")
    print(f"largest logprob_gap: {max(row['logprob_gap'] for row in metrics):.2g}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = OPTIONS | {"train.rounds": args.rounds, "engine.max_restarts": 3 * args.faults}
    options |= {"engine.start_timeout_s": START_S, **LONGER}
    with tempfile.TemporaryDirectory() as folder:
        words = [str(w) for key, value in options.items() for w in (f"--{key}", value)]
        begin = time.monotonic()
        with Launched(["--recipe", str(write_project(Path(folder))), *words], Path(folder)) as run:
            made = inject(run, random.Random(args.seed), args.faults, args.rounds)
            wait_for(lambda: f"the run's end:\n{run.screen[-3000:]}", lambda: run.process.poll() is not None, QUIET_S)
            code = run.ends(60)
            noticed = [line for line in run.screen.splitlines() if "engine replica" in line]
            print("\n".join(noticed))
            print(f"{made} faults, exit code {code}, {time.monotonic() - begin:.0f} s")
            wrong = judge(run.folder, args.rounds, made, len(noticed)) if code == 0 else [run.screen[-3000:]]
    if made < args.faults:
        wrong.append(f"the run ended after {made} of {args.faults} faults")
    good = "the run finished, nothing was lost, nothing came twice, every token has its version"
    print(f"PASS: {args.faults} faults in {args.rounds} rounds, {good}" if not wrong else "FAIL: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
