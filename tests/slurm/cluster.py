"""A SLURM of its own: one slurmctld and two slurmd on this machine, as the user who runs the tests.

All state lies in one folder, ports are free ones, job numbers are those of no other cluster here (jobs derive ports from
them). Each daemon runs under a guard, which ends it and all that it started for jobs when the test ends, however it ends.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
NODES = ("n1", "n2")
_CPUS_A_NODE = 4
START_S = 60.0
"""Deadline of a daemon's start."""

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
FirstJobId={first}
SlurmdTimeout=15
SlurmctldTimeout=15
KillWait=5
BatchStartTimeout=10
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
StateSaveLocation={state}/ctld
SlurmctldPidFile={state}/ctld.pid
SlurmctldLogFile={state}/ctld.log
SlurmdSpoolDir={state}/%n
SlurmdPidFile={state}/%n.pid
SlurmdLogFile={state}/%n.log
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
"""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _binary(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert found, f"{name} is not installed; Debian and Ubuntu have it in the package slurm-wlm"
    return found


def wait_for(what: str, condition: Callable[[], object], timeout_s: float, poll_s: float = 0.3) -> None:
    """Raises AssertionError naming `what` when it has not come true within the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(poll_s)


class Cluster:
    """Two nodes, n1 and n2, of four CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("ctld", *NODES):
            (folder / name).mkdir(parents=True)
        control, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={_CPUS_A_NODE}"
            for name, port in zip(NODES, ports, strict=True)
        )
        conf = folder / "slurm.conf"
        conf.write_text(
            _CONF.format(
                host=socket.gethostname(),
                control=control,
                user=getpass.getuser(),
                state=folder,
                nodes=nodes,
                first=control,
            )
        )
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
        self.env |= {
            "SLURM_CONF": str(conf),
            "GRPO_DS_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GRPO_DS_SLURM_TEST": str(folder),
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._daemon("ctld", [_binary("slurmctld"), "-D", "-i"])
        for name in NODES:
            self.start_node(name)
        self.wait_idle()

    def start_node(self, name: str) -> None:
        self._daemon(name, [_binary("slurmd"), "-D", "-N", name])

    def _daemon(self, name: str, command: list[str]) -> None:
        guard = [sys.executable, "-m", "grpo_ds.engine.guard", "--log", str(self.folder / f"{name}.out"), "--"]
        self.daemons[name] = subprocess.Popen(
            [*guard, *command], cwd=ROOT, env=self.env, stdin=subprocess.PIPE, start_new_session=True
        )

    def wait_idle(self) -> None:
        """Both nodes are ready for jobs."""

        def idle() -> bool:
            done = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False)
            return sorted(done.split()) == ["idle", "idle", *NODES]

        wait_for(f"both nodes idle; see {self.folder}/*.log", idle, START_S)

    def stop(self) -> None:
        """Ends jobs, then the daemons."""
        try:
            self.command("scancel", "--user", getpass.getuser(), check=False)
            wait_for("no job is left", lambda: not self.command("squeue", "-h", check=False).strip(), 60)
        finally:
            for daemon in self.daemons.values():
                daemon.terminate()
            for daemon in self.daemons.values():
                try:
                    daemon.communicate(timeout=15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.communicate()
            for process in self.processes():
                process.kill()

    def lose_node(self, name: str) -> list[psutil.Process]:
        """Kills the node's slurmd (with its guard) and everything that runs on it, as a power cut does."""
        victims = [p for p in self.processes() if variable(p, "SLURMD_NODENAME") == name]
        steps = [p for p in psutil.process_iter() if self._is_step_daemon(p, name)]
        daemon = self.daemons.pop(name)
        for process in [psutil.Process(daemon.pid), *steps, *victims]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # it ended with the one before
        daemon.communicate()
        return victims

    def _is_step_daemon(self, process: psutil.Process, name: str) -> bool:
        """slurmstepd runs without an environment, but its node's log or its own children's tell where it belongs."""
        try:
            if not process.name().startswith("slurmstepd"):
                return False
            # Another cluster of this machine may have a node of the same name.
            mine = [p for p in process.children() if variable(p, "GRPO_DS_SLURM_TEST") == str(self.folder)]
            return any(variable(child, "SLURMD_NODENAME") == name for child in mine)
        except psutil.NoSuchProcess:
            return False

    def processes(self) -> list[psutil.Process]:
        """Every living process that a job of this cluster started."""
        mark = str(self.folder)
        return [
            p
            for p in psutil.process_iter()
            if variable(p, "GRPO_DS_SLURM_TEST") == mark and variable(p, "SLURM_JOB_ID") and _lives(p)
        ]

    # ---- the user's commands ----

    def command(self, *words: str, check: bool = True, cwd: Path = ROOT, timeout_s: float = 60.0) -> str:
        done = subprocess.run(
            [_binary(words[0]), *words[1:]],
            env=self.env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, cwd: Path, *options: str, arguments: list[str]) -> Job:
        """sbatch launch/slurm.sbatch on both nodes with one task each."""
        return self._submit(cwd, "--nodes=2", "--ntasks-per-node=1", *options, "slurm.sbatch", *arguments)

    def submit_with_engines(self, cwd: Path, arguments: list[str]) -> Job:
        """sbatch launch/slurm_engines.sbatch: one node trains, the other one serves."""
        return self._submit(cwd, "slurm_engines.sbatch", *arguments)

    def _submit(self, cwd: Path, *words: str) -> Job:
        words = tuple(str(ROOT / "launch" / word) if word.endswith(".sbatch") else word for word in words)
        return Job(self, self.command("sbatch", "--parsable", *words, cwd=cwd).strip(), cwd)


class Job:
    """A submitted job, or a task of an array as <array>_<task>."""

    def __init__(self, cluster: Cluster, number: str, cwd: Path) -> None:
        self.cluster = cluster
        self.number = number
        self.cwd = cwd

    def show(self, key: str) -> str:
        found = re.search(rf"\b{key}=(\S*)", self.cluster.command("scontrol", "show", "job", self.number))
        assert found, f"scontrol names no {key}"
        return found[1]

    @property
    def state(self) -> str:
        return self.show("JobState")

    def wait(self, timeout_s: float) -> str:
        """The state in which the job ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(f"the end of job {self.number}:\n{self.screen[-3000:]}", lambda: self.state in ended, timeout_s)
        return self.state

    def minutes(self) -> int:
        """Whole minutes that it has run; SLURM shows [[days-]hours:]minutes:seconds."""
        words = [int(word) for word in self.show("RunTime").replace("-", ":").split(":")]
        seconds = sum(word * unit for word, unit in zip(reversed(words), (1, 60, 3600, 86400), strict=False))
        return seconds // 60

    def start_now(self) -> None:
        """SLURM lets a job that is queued again wait two minutes; a test does not.

        In the first seconds the node would still refuse it: the credential of the start before is being revoked.
        """
        time.sleep(8)
        self.cluster.command("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        (found,) = (self.cwd / "runs").glob(f"*-{self.number}-*")
        return found

    def rounds(self) -> int:
        files = list((self.cwd / "runs").glob(f"*-{self.number}-*/metrics.jsonl"))
        return len(files[0].read_text().splitlines()) if files else 0

    @property
    def screen(self) -> str:
        """What the batch script and the nodes printed."""
        logs = sorted((self.cwd / "runs" / "slurm" / self.number).glob("*.log"))
        return "\n".join(p.read_text(errors="replace") for p in [*self.cwd.glob(f"slurm-{self.number}.out"), *logs])

    def processes(self) -> list[psutil.Process]:
        def number(process: psutil.Process) -> str:
            if array := variable(process, "SLURM_ARRAY_JOB_ID"):
                return f"{array}_{variable(process, 'SLURM_ARRAY_TASK_ID')}"
            return variable(process, "SLURM_JOB_ID")

        return [p for p in self.cluster.processes() if number(p) == self.number]


def command_line(process: psutil.Process) -> str:
    """Empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def variable(process: psutil.Process, name: str) -> str:
    """A variable of its environment; empty when it has none, or has ended."""
    try:
        return str(process.environ().get(name, ""))
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, ProcessLookupError):
        return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
