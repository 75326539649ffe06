"""Two nodes with addresses of their own on this machine: two network namespaces on a wire, each with an ssh server."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from grpo_ds.engine.guard import die_with_parent
from tests.slurm.cluster import ROOT, wait_for

BIN = Path(sys.executable).parent
ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIRE = "wire0"
"""The interface's name on both nodes: a name for gloo must hold on all of them."""
PORT = "29400"
"""Free by construction: the namespaces are new."""
TOGETHER_S = 240.0
"""Deadline of what both nodes do; generous, because they share this machine's cores."""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr} (network namespaces need root)"


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Names of two namespaces, whose WIRE has ADDRESSES; those of a run that was killed are removed first."""
    for name in abandoned():
        _delete(name)
    names = [f"grpo-{os.getpid()}-{_started(os.getpid())}-{k}" for k in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", WIRE)
            ip("-n", name, "link", "set", WIRE, "up")
        yield names
    finally:
        for name in names:
            _delete(name)


def _started(pid: int) -> str:
    """When a process started, in clock ticks; with its pid this names it. Empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def abandoned() -> list[str]:
    """The namespaces whose maker is gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30, check=True).stdout
    found = re.finditer(r"^grpo-(\d+)-(\d+)-\d\b", listed, re.MULTILINE)
    return [match[0] for match in found if _started(int(match[1])) != match[2]]


def _delete(name: str) -> None:
    """Ends what still runs in the namespace, then removes it, if it is there."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30, check=False)
    for pid in listed.stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself in the meantime
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30, check=False)


def inside(namespace: str, *command: str, setup: str = "") -> list[str]:
    """A command in a namespace; `ip netns exec` gives it mounts of its own, which `setup`, a shell's line, may change."""
    shell = ["sh", "-c", f'{setup} && exec "$@"', "sh"] if setup else []
    return ["ip", "netns", "exec", namespace, *shell, *command]


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    # This machine's name means a loopback address in both namespaces, so the interface is named.
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": WIRE}
    return env | own | more


def rank(number: int, **more: str) -> dict[str, str]:
    """What a launcher gives a rank of two nodes with one each."""
    place = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return environment(**place, MASTER_ADDR=ADDRESSES[0], MASTER_PORT=PORT, **more)


def together(
    commands: Sequence[Sequence[str]],
    cwd: Path,
    environments: Sequence[dict[str, str]],
    timeout_s: float = TOGETHER_S,
) -> list[str]:
    """Runs the commands at the same time; returns what each printed."""
    with ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        started = [
            subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            for command, env, out in zip(commands, environments, outputs, strict=True)
        ]
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            time.sleep(0.1)
        late = [process for process in started if process.poll() is None]
        for process in late:
            process.kill()  # the ranks end with their launcher
            process.wait()
        screens = []
        for out in outputs:
            out.seek(0)
            screens.append(out.read())
    assert not late, f"not done within {timeout_s:g} s:\n" + "\n".join(screens)
    return screens


def hostfile(folder: Path) -> str:
    """A hostfile of both nodes, one rank each."""
    file = folder / "hostfile"
    file.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return str(file)


MASTER = ["--master-addr", ADDRESSES[0], "--master-port", PORT]


def torchrun(node: int) -> list[str]:
    """The launcher's part of the command line on a node."""
    return [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), *MASTER]


def deepspeed(folder: Path, *how: str) -> list[str]:
    """The same with deepspeed, whose hostfile comes to lie in `folder`."""
    words = [word.replace("-addr", "_addr").replace("-port", "_port") for word in MASTER]
    return [str(BIN / "deepspeed"), "--hostfile", hostfile(folder), *how, *words]


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert found, f"{name} is not installed; Debian and Ubuntu have it in the package {package}"
    return found


@contextmanager
def ssh_servers(namespaces: Sequence[str], folder: Path) -> Iterator[dict[str, str]]:
    """A dropbear on each node that lets this test in; yields the variables with which pdsh reaches them.

    Not OpenSSH's server: Debian's package of that one would start a daemon on this machine.
    """
    keys = folder / "ssh"
    keys.mkdir(mode=0o700)
    host, user = str(keys / "host"), str(keys / "user")
    make_host = [program("dropbearkey", "dropbear-bin"), "-t", "ed25519", "-f", host]
    make_user = [program("ssh-keygen", "openssh-client"), "-q", "-t", "ed25519", "-N", "", "-f", user]
    for words in (make_host, make_user):
        subprocess.run(words, check=True, timeout=30, capture_output=True)
    (keys / "authorized_keys").write_text((keys / "user.pub").read_text())
    # It reads nothing but the home folder's .ssh, so the node has one of its own there.
    home = f"{pwd.getpwuid(os.getuid()).pw_dir}/.ssh"
    setup = f"mkdir -p -m 700 {home} && mount --bind {keys} {home}"
    server = [program("dropbear", "dropbear-bin"), "-F", "-E", "-s", "-m", "-r", host]
    logs = [folder / f"sshd-{k}.log" for k in range(len(namespaces))]
    daemons = []
    try:
        for namespace, address, log in zip(namespaces, ADDRESSES, logs, strict=True):
            command = inside(namespace, *server, "-p", f"{address}:22", "-P", f"{log}.pid", setup=setup)
            with open(log, "wb") as out:
                daemons.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=die_with_parent
                    )
                )
        wait_for("both ssh servers listen", lambda: all("Not backgrounding" in log.read_text() for log in logs), 30)
        trust = f"-i {user} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        yield {"PDSH_SSH_ARGS_APPEND": trust}
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=15)
