"""`grpo-ds doctor`: can these nodes train together? Says what is wrong, the first thing first, and how to put it right.

Start it as a run is started, on the same nodes:

    srun ... python -m grpo_ds.doctor        torchrun ... -m grpo_ds.doctor        deepspeed ... --module grpo_ds.doctor

Each rank collects `Facts` about its machine; `grpo_ds.doctor_checks` judges them. What is wrong with one rank before it
meets the others is told to all of them where the port can be reached. Bytes: the all-reduces of SIZES, twice each, 64 MB
from each node to the next one, and ~1 KB of facts a rank.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from grpo_ds.config import Recipe, RecipeError
from grpo_ds.doctor_checks import (
    Facts,
    Finding,
    check_bandwidth,
    check_clocks,
    check_cpus,
    check_devices,
    check_engine,
    check_folder,
    check_interface,
    check_memory,
    check_place,
    check_port,
    check_shm,
    check_versions,
    table,
)
from grpo_ds.peers import node_name
from grpo_ds.processes import adopt_slurm, leave
from grpo_ds.runlog import manifest

SIZES = {"1 MB": 2**20, "256 MB": 2**28}
LINK_BYTES = 2**26


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", default="runs", help="folder that all nodes have to see (default: runs)")
    parser.add_argument("--recipe", help="also start this recipe's engine on every node")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="deadline of each step (default: 120)"
    )
    parser.set_defaults(run=examine)


def examine(args: argparse.Namespace) -> int:
    """Check that the nodes of this launch can train together; exit code 1 if something is wrong."""
    adopt_slurm(os.environ)
    findings = _before(args.timeout)
    wrong = [f for f in findings if f.problem]
    # Without a place and a port there is no way to tell the others.
    met = not any(f.check in ("place", "port") for f in wrong)
    if met:
        try:
            findings += _together(args, f"{wrong[0].check}: {wrong[0].problem}" if wrong else "")
        except RecipeError:
            raise
        except Exception as error:  # whatever it is, it is what is wrong here
            met = False
            if not wrong:
                cause = " ".join(str(error).split())
                named = cause if type(error).__name__ == "DistError" else f"{type(error).__name__}: {cause}"
                findings.append(Finding("meeting", "the ranks did not get through the checks", named))
    # Before they have met, every rank speaks for itself.
    if os.environ.get("RANK", "0") == "0" or not met:
        print(f"[{node_name()}]\n{table(findings)}", flush=True)
    return int(any(f.problem for f in findings))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: nothing is wrong, 1: something is, 2: wrong input."""
    parser = argparse.ArgumentParser(prog="grpo-ds doctor", description=examine.__doc__)
    add_arguments(parser)
    try:
        return examine(parser.parse_args(argv))
    except RecipeError as error:
        print(f"grpo-ds doctor: {error}", file=sys.stderr)
        return 2


def _before(timeout_s: float) -> list[Finding]:
    from grpo_ds.actor import backend

    environ = dict(os.environ)
    findings = [check_place(environ)]
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    findings.append(check_interface(environ, address, [name for _, name in socket.if_nameindex()]))
    each = int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", "1")))
    findings.append(check_cpus(len(os.sched_getaffinity(0)), os.cpu_count() or 1, each))
    kind, local_rank = backend.device_kind(), int(environ.get("LOCAL_RANK", "0"))
    findings.append(check_devices(kind, each if kind == "cpu" else backend.device_count(), local_rank))
    if not findings[0].problem and int(environ.get("WORLD_SIZE", "1")) > 1:
        # torchrun's own store listens there already and the ranks use it.
        is_main = environ["RANK"] == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        findings.append(check_port(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_main, timeout_s))
    return findings


def _together(args: argparse.Namespace, obstacle: str) -> list[Finding]:
    """Joins the ranks, gathers their facts and judges them; the same findings on every rank.

    obstacle: what is wrong with this rank already; then all ranks raise DistError with it.
    """
    from grpo_ds.actor import backend
    from grpo_ds.dist import Ranks
    from grpo_ds.recipe import read_recipe

    recipe = read_recipe(["--recipe", args.recipe]) if args.recipe else None
    # Ranks without an engine wait for those that start one.
    ranks = Ranks(args.timeout + (recipe[0].engine.start_timeout_s if recipe else 0.0), args.timeout)
    ranks.obstacle = obstacle
    ranks.advice = "look at what their own doctor printed, and if their node runs at all"
    backend.connect(ranks)
    token = ranks.broadcast(_write_token(Path(args.run_dir)) if ranks.is_main else None, "token")
    if len(token) == 1:
        ranks.close()
        return [Finding("shared folder", args.run_dir, token[0])]
    sees = _reads(token)
    gb_s: dict[str, float] = {}
    for name, nbytes in SIZES.items():
        gb_s[f"{name} gloo"] = _rate(ranks, nbytes, lambda n: ranks.all_reduce_seconds(n))
        if backend.device_kind() != "cpu":
            gb_s[f"{name} device"] = _rate(ranks, nbytes, lambda n: ranks.all_reduce_seconds(n, backend.device(ranks)))
    engine = _start_engine(*recipe, ranks) if recipe and ranks.leads_node else ""
    info = manifest(ranks.world, backend.device_kind(), "", backend.accelerators())
    seconds = ranks.seconds_from_node_before(LINK_BYTES)
    ranks.barrier("clocks")
    clock_s = time.time()  # at once: what else a rank does takes different times
    mine = Facts(
        rank=ranks.rank,
        node=node_name(),
        versions={"python": info["python"], "commit": str(info["git_commit"]), **info["packages"]},
        clock_s=clock_s,
        sees_folder=sees,
        shm_gib=shutil.disk_usage("/dev/shm").free / 2**30,
        memory_gib=psutil.virtual_memory().available / 2**30,
        local_world=ranks.local_world,
        gb_s=gb_s,
        from_before_gb_s=LINK_BYTES / seconds / 1e9 if seconds else 0.0,
        fastest_gbit=_fastest_gbit(),
        engine=engine,
    )
    everyone = [Facts(**row) for row in ranks.all_gather(asdict(mine), "facts")]
    if ranks.is_main:
        Path(token[0]).unlink()
    ranks.close()
    findings = [check_versions(everyone), check_clocks(everyone), check_folder(everyone, str(Path(args.run_dir)))]
    findings += [check_shm(everyone), check_memory(everyone)]
    if ranks.world > 1:
        findings += [check_bandwidth(everyone, what) for what in gb_s]
    return findings + ([check_engine(everyone)] if args.recipe else [])


def _write_token(folder: Path) -> list[str]:
    """[path, content] of a file that the other ranks look for, or [why it cannot be written]."""
    path = folder.resolve() / f".doctor-{os.getpid()}-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    except OSError as error:
        return [f"{node_name()} cannot write there ({error.strerror}): give run.dir another place, or mend its rights"]
    return [str(path), path.name]


def _reads(token: list[str], patience_s: float = 10.0) -> bool:
    """Network file systems show a new file after a while."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return Path(token[0]).read_text() == token[1]
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)


def _rate(ranks: Any, nbytes: int, measure: Callable[[int], float]) -> float:
    """GB/s of the better of two tries: the first one makes the connections."""
    seconds = min(measure(nbytes), measure(nbytes))
    return 2 * (ranks.world - 1) / ranks.world * nbytes / max(seconds, 1e-9) / 1e9


def _fastest_gbit(sys_class: Path = Path("/sys/class")) -> dict[str, float]:
    """What the kernel says of this machine's network cards; NCCL prefers InfiniBand's."""
    found = []
    for file in sys_class.glob("net/*/speed"):
        try:
            found.append(int(file.read_text()) / 1000)
        except OSError:
            continue  # not up, or a card without a speed
    infiniband = [float(file.read_text().split()[0]) for file in sys_class.glob("infiniband/*/ports/*/rate")]
    fastest = {"gloo": max(found, default=0.0), "device": max(infiniband or found, default=0.0)}
    return {kind: gbit for kind, gbit in fastest.items() if gbit > 0}


def _start_engine(recipe: Recipe, bases: list[Path], ranks: Any) -> str:
    """Starts the recipe's engine and ends it; returns what went wrong, with the last line of the engine's log."""
    import tempfile

    from grpo_ds import build
    from grpo_ds.actor import backend
    from grpo_ds.recipe import resolve_path

    model = str(resolve_path(recipe.model.path, bases) or recipe.model.path)
    with tempfile.TemporaryDirectory() as folder:
        engine = build.make_node_engine(recipe, model, backend.resolve_dtype(recipe.model), Path(folder), ranks)
        try:
            engine.start()
            engine.wait_ready()
        except Exception as error:  # the reason is carried to rank 0's table
            said = str(error).strip().splitlines() or [""]
            end = f" (its log ends: {said[-1].strip()})" if len(said) > 1 else ""
            return f"{node_name()}: {type(error).__name__}: {said[0]}{end}"
        finally:
            engine.close()
    return ""


if __name__ == "__main__":
    leave(main())
