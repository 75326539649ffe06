"""What the doctor concludes: functions of facts that know no process group; each returns a `Finding`.

First the checks of one machine that decide whether the ranks can meet at all, then those of all ranks' `Facts`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MAX_CLOCK_SPREAD_S = 2.0
"""Clocks further apart make logs of different nodes unreadable and file times misleading (resume compares them)."""
MIN_SHM_GIB = 1.0
"""NCCL's and vLLM's processes of a node talk through /dev/shm; containers often get 64 MiB."""
MIN_MEMORY_GIB = 2.0
"""A rank's own libraries need about 1 GiB before it holds any weights."""
MIN_GB_S = 0.0625
"""Half of what 1 Gbit Ethernet carries; below, a network that was never meant for this is in use."""
MIN_SHARE = 0.05
"""Of the fastest network card's speed. Virtual cards say 10 Gbit whatever carries them, so this is no more than a hint."""


@dataclass(frozen=True)
class Facts:
    """What one rank found out about itself and its machine; travels as JSON."""

    rank: int
    node: str
    versions: dict[str, str]
    clock_s: float = 0.0
    """Time of day just after a meeting of all ranks, in seconds."""
    sees_folder: bool = True
    """Whether the file that rank 0 wrote into the run folder's parent is there, with its content."""
    shm_gib: float = 0.0
    """Free space of /dev/shm."""
    memory_gib: float = 0.0
    """Memory that is available now."""
    local_world: int = 1
    gb_s: dict[str, float] = field(default_factory=dict)
    """Bandwidth of an all-reduce by size and group: bytes a rank sends, 2 (n - 1) / n of the tensor, a second."""
    from_before_gb_s: float = 0.0
    """Bandwidth from the node before to this one, on the rank that leads it; 0: not measured."""
    fastest_gbit: dict[str, float] = field(default_factory=dict)
    """Speed of this machine's fastest network card, for `gloo` and for the `device`; absent: not known."""
    engine: str = ""
    """Why this node's engine did not start; empty: it did, or was not tried."""


@dataclass(frozen=True)
class Finding:
    """A line of the table."""

    check: str
    found: str
    problem: str = ""
    """What is wrong and what to do; empty: nothing."""


# ---- before the ranks meet ----


def check_place(environ: dict[str, str]) -> Finding:
    """The launcher's variables name a place for this rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environ]
    world = int(environ.get("WORLD_SIZE", "1"))
    if world == 1 and "RANK" not in environ:
        return Finding("place", "one rank, no launcher")
    found = f"rank {environ.get('RANK')} of {world}"
    if missing:
        return Finding("place", found, f"{', '.join(missing)} not set: start with deepspeed, torchrun or slurm.sbatch")
    if not 0 <= int(environ["RANK"]) < world:
        return Finding("place", found, "the rank lies outside: the launchers of the nodes disagree on the world size")
    return Finding("place", found)


def check_interface(environ: dict[str, str], own_address: str, interfaces: Sequence[str]) -> Finding:
    """The address that gloo will tell the other nodes is one that they can reach."""
    for name, there in (("GLOO_SOCKET_IFNAME", _gloo_finds), ("NCCL_SOCKET_IFNAME", _nccl_finds)):
        value = environ.get(name, "")
        if value and not there(value, interfaces):
            return Finding(
                "interface", value, f"{name} names an interface that is not here: choose of {', '.join(interfaces)}"
            )
    nodes = int(environ.get("WORLD_SIZE", "1")) > int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", "1")))
    away = nodes and not _is_loopback(environ.get("MASTER_ADDR", ""))
    if away and _is_loopback(own_address) and not environ.get("GLOO_SOCKET_IFNAME"):
        return Finding(
            "interface",
            own_address,
            "this machine's own name means a loopback address, which other nodes cannot reach: set GLOO_SOCKET_IFNAME "
            f"(and NCCL_SOCKET_IFNAME) to one of {', '.join(i for i in interfaces if i != 'lo')}",
        )
    return Finding("interface", own_address)


def _gloo_finds(value: str, interfaces: Sequence[str]) -> bool:
    """Whole names, all of which gloo uses."""
    return all(name in interfaces for name in value.split(","))


def _nccl_finds(value: str, interfaces: Sequence[str]) -> bool:
    """Beginnings of names, of which one is enough; whole names after `=`; after `^` those not to use."""
    if value.startswith("^"):
        return True
    names = value.removeprefix("=").split(",")
    return any(i == name if value.startswith("=") else i.startswith(name) for name in names for i in interfaces)


def check_cpus(usable: int, cpus: int, local_world: int) -> Finding:
    """The rank, and so the engine and the reward processes that inherit its mask, may use the node's CPUs."""
    found = f"{usable} of {cpus}"
    fix = (
        f"this rank may use {usable} of {cpus} CPUs, and its engine and reward processes no others: start it with "
        "srun --cpu-bind=none, and give the job the whole node (sbatch --exclusive)"
    )
    return Finding("cpus", found, fix if usable < min(max(2, local_world), cpus) else "")


def check_devices(kind: str, count: int, local_rank: int) -> Finding:
    """There is a device for this rank."""
    fix = (
        f"this rank has the number {local_rank} on its node and sees {count} of its devices ({kind}): let every rank see "
        "all of them (no --gpus-per-task, no CUDA_VISIBLE_DEVICES of its own), and start no more ranks than devices"
    )
    return Finding("devices", kind if kind == "cpu" else f"{count} ({kind})", fix if local_rank >= count else "")


def check_port(host: str, port: int, is_main: bool, timeout_s: float) -> Finding:
    """MASTER_PORT is free on the first node; the others wait until something answers there."""
    found = f"{host}:{port}"
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        return Finding("port", found, f"MASTER_ADDR {host} has no address here ({error}): give an address instead")
    if is_main:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                return Finding("port", found, f"MASTER_PORT cannot be used ({error.strerror}): give another one")
        return Finding("port", found)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return Finding("port", found)
        except OSError as error:
            if time.monotonic() > deadline:
                reason = f"nothing answered within {timeout_s:g} s ({error})"
                return Finding("port", found, f"{reason}: open the port in the firewall, or see if rank 0 runs")
            time.sleep(0.2)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("localhost", "::1", "")


# ---- from all ranks' facts ----


def check_versions(ranks: Sequence[Facts]) -> Finding:
    """All ranks run the same code."""
    first = ranks[0].versions
    found = f"python {first.get('python')}, torch {first.get('torch')}, deepspeed {first.get('deepspeed')}"
    for facts in ranks:
        for name in sorted({*first, *facts.versions}):
            mine, theirs = facts.versions.get(name, "not there"), first.get(name, "not there")
            if mine != theirs:
                where = f"{name} is {mine} on {facts.node} and {theirs} on {ranks[0].node}"
                return Finding("versions", found, f"{where}: use one environment on a shared file system")
    return Finding("versions", found)


def check_clocks(ranks: Sequence[Facts]) -> Finding:
    """The clocks agree."""
    ordered = sorted(ranks, key=lambda facts: facts.clock_s)
    early, late = ordered[0], ordered[-1]
    spread = late.clock_s - early.clock_s
    problem = f"{late.node} is {spread:.1f} s ahead of {early.node}: let both follow one time server"
    return Finding("clocks", f"{spread:.2f} s apart", problem if spread > MAX_CLOCK_SPREAD_S else "")


def check_folder(ranks: Sequence[Facts], folder: str) -> Finding:
    """Every node sees what rank 0 writes."""
    blind = _nodes(facts for facts in ranks if not facts.sees_folder)
    fix = (
        f"{blind} does not see a file that {ranks[0].node} wrote there: let run.dir be on a file system all nodes share"
    )
    return Finding("shared folder", folder, fix if blind else "")


def check_shm(ranks: Sequence[Facts]) -> Finding:
    """/dev/shm has room."""
    least = min(ranks, key=lambda facts: facts.shm_gib)
    few = least.shm_gib < MIN_SHM_GIB
    fix = f"{least.node} has {least.shm_gib:.2f} GiB free, {MIN_SHM_GIB:g} are needed: mount it larger (--shm-size)"
    return Finding("/dev/shm", f"{least.shm_gib:.1f} GiB free at least", fix if few else "")


def check_memory(ranks: Sequence[Facts]) -> Finding:
    """Memory for every rank of a node."""
    least = min(ranks, key=lambda facts: facts.memory_gib / facts.local_world)
    share = least.memory_gib / least.local_world
    fix = f"{least.node} has {share:.1f} GiB a rank, {MIN_MEMORY_GIB:g} are needed: ask for more memory or fewer ranks"
    return Finding("memory", f"{share:.1f} GiB a rank at least", fix if share < MIN_MEMORY_GIB else "")


def check_bandwidth(ranks: Sequence[Facts], what: str) -> Finding:
    """An all-reduce runs at the speed of a network meant for it; only large ones are judged, small ones are latency."""
    rate = min(facts.gb_s[what] for facts in ranks)
    cards = [facts.fastest_gbit[kind] for facts in ranks for kind in facts.fastest_gbit if kind in what]
    # A ring is as fast as its slowest node; on one node no network card is on the way.
    limit = max(MIN_GB_S, MIN_SHARE * min(cards) / 8) if cards and len({f.node for f in ranks}) > 1 else MIN_GB_S
    problem = ""
    if "256" in what and rate < limit:
        made_for = f", with network cards of {min(cards):g} Gbit/s" if cards else ""
        problem = (
            f"{rate:.3f} GB/s{made_for}{_slowest_way(ranks)}: name the fast interface in GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME"
        )
    return Finding(f"all-reduce {what}", f"{rate:.2f} GB/s", problem)


def _slowest_way(ranks: Sequence[Facts]) -> str:
    leads = [facts for facts in ranks if facts.from_before_gb_s]
    if not leads:
        return ""
    slow = min(range(len(leads)), key=lambda k: leads[k].from_before_gb_s)
    return f", slowest from {leads[slow - 1].node} to {leads[slow].node} ({leads[slow].from_before_gb_s:.3f} GB/s)"


def check_engine(ranks: Sequence[Facts]) -> Finding:
    """Every node's engine came up."""
    failed = [facts for facts in ranks if facts.engine]
    return Finding(
        "engine", "started on every node" if not failed else _nodes(failed), failed[0].engine if failed else ""
    )


def _nodes(ranks: Iterable[Facts]) -> str:
    return ", ".join(sorted({facts.node for facts in ranks}))


def table(findings: Sequence[Finding]) -> str:
    """One line a check, then the problems in the order in which to mend them."""
    width = max(len(f.check) for f in findings)
    lines = [f"{f.check:<{width}}  {'WRONG' if f.problem else 'ok   '}  {f.found}" for f in findings]
    wrong = [f"doctor: {f.check}: {f.problem}" for f in findings if f.problem]
    return "\n".join([*lines, *(wrong or ["doctor: all is well"])])
