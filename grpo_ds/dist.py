"""Rank facts and the few collectives the trainer uses itself; the only file that talks to torch.distributed.

Control data travels as JSON and samples as safetensors bytes over a gloo group of their own: nothing is unpickled from
a socket, and DeepSpeed's device collectives never interleave with ours. Every collective has the deadline of its group,
and its failure names the step, the rank, the operation, and the nodes whose ranks are gone (`grpo_ds.peers`).

Bytes at 64 nodes x 8 ranks, 512 prompts x 16 samples, 22k tokens: the filter's all-gather is ~100 B a group, 0.8 KB from
each lead, and every rank receives 512 rows of the widest one's size, 0.4 MB. The all-to-all moves each sample once, 25 B
a token (`grpo_ds.samples`): 8192 x 22k x 25 B = 4.5 GB in all; a rank receives 8.8 MB, and the leads, which alone have
samples, send 70 MB each. Nothing is funnelled through rank 0. Weight shards cross nodes in columns of ranks, see
`grpo_ds.sync.publish`.

All of this, shards included, is gloo's: TCP over the interface that this machine's name means, or the one that
GLOO_SOCKET_IFNAME names, on GPU clusters too. Name the fast one: 138 GB of shards a node and publication (70B) take 110 s
at 10 Gb/s and 11 s at 100 Gb/s.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from grpo_ds import rollcall
from grpo_ds.peers import Answering, Peer, Watch, describe, node_name, silent
from grpo_ds.processes import say_last


class DistError(RuntimeError):
    """The ranks could not be connected; the message says what to do."""


class PeerError(DistError):
    """A collective failed or missed its deadline; the message names rank, operation, step and the peers that are gone."""


class Ranks:
    """This process among its peers.

    `node_leads` are the ranks that drive an engine: local rank 0 of each node.
    """

    def __init__(self, timeout_s: float, start_timeout_s: float | None = None) -> None:
        """timeout_s: of a collective; start_timeout_s: until all ranks have met (None: the same)."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0"))) or self.world
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s or timeout_s
        self.obstacle = ""
        """Why this rank cannot go on, for `connect` to tell all of them."""
        self.terms: dict[str, str] = {}
        """What this rank has read, for `connect` to compare with what rank 0 has (`grpo_ds.agreement`)."""
        self.advice = (
            "if it is only slow, raise train.start_timeout_s, else `python -m grpo_ds.doctor`, started in the same way, "
            "says why"
        )
        """What to do when ranks do not meet."""
        self.where = "start-up"
        self._group: Any = None
        self._column: Any = None
        self._peers: list[Peer] = []
        self._answering: Answering | None = None
        self._watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """True on the rank that drives this node's engine."""
        return self.local_rank == 0

    @property
    def node(self) -> int:
        """Index of this node."""
        return self.rank // self.local_world

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.world // self.local_world)

    def connect(self, backend: str) -> None:
        """Joins the default group (`backend`: gloo or nccl) and makes the gloo control group."""
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if self.world == 1 and "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = "0"
        os.environ.setdefault("RANK", str(self.rank))
        os.environ.setdefault("WORLD_SIZE", str(self.world))
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        start = datetime.timedelta(seconds=self.start_timeout_s)
        try:
            store = self._store(start)
            verdict = rollcall.call(store, self._place(), self.world, self.start_timeout_s)
            if verdict == rollcall.FINE:
                self._make_groups(backend, store, start)
        except RuntimeError as error:  # of the store, or of the groups' own connections
            port = os.environ.get("MASTER_PORT")
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise DistError(
                    f"MASTER_PORT {port} is taken by another program on this machine: start with another one "
                    "(deepspeed --master_port N, torchrun --master-port N)"
                ) from None
            reason = str(error).splitlines()[0][:300]
            raise DistError(
                f"rank {self.rank} on {node_name()} could not join the others at {os.environ['MASTER_ADDR']}:{port} "
                f"within {self.start_timeout_s:g} s; {self.advice}: {reason}"
            ) from error
        if verdict != rollcall.FINE:
            raise DistError(f"{verdict}: {self.advice}" if verdict.startswith(rollcall.MISSING) else verdict)
        self._meet()

    def _place(self) -> rollcall.Place:
        job = os.environ.get("GRPO_DS_JOB", "")
        place = (self.rank, self.local_rank, self.local_world, node_name())
        return rollcall.Place(*place, job, self.obstacle, self.terms)

    def _store(self, timeout: datetime.timedelta) -> Any:
        """As init_process_group makes it, but without its own waiting for all ranks, which names nobody."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's own process holds the store of its ranks, over their restarts.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(host, port, self.world, self.rank == 0 and not agent, timeout, wait_for_workers=False)
        return dist.PrefixStore(f"grpo_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _make_groups(self, backend: str, store: Any, start: datetime.timedelta) -> None:
        """The groups; they connect within the deadline of the start, and wait for a collective as long as that may take."""
        dist.init_process_group(backend, store=store, timeout=start, rank=self.rank, world_size=self.world)
        self._group = dist.new_group(backend="gloo", timeout=start)
        groups = [dist.group.WORLD, self._group]
        for local in range(self.local_world if self.nodes > 1 else 0):
            members = list(range(local, self.world, self.local_world))
            column = dist.new_group(members, backend="gloo", timeout=start)
            if local == self.local_rank:
                self._column = column
                groups.append(column)
        for group in groups:
            _set_pg_timeout(datetime.timedelta(seconds=self.timeout_s), group)

    def _meet(self) -> None:
        """The ranks learn where the others can be asked whether they live."""
        try:
            self._answering = Answering(self.rank, on_first_node=self.node == 0, one_node=self.nodes == 1)
        except OSError as error:
            raise DistError(
                f"rank {self.rank} on {node_name()} finds no address under which the other nodes reach it, on the way to "
                f"MASTER_ADDR {os.environ['MASTER_ADDR']}: {error}"
            ) from error
        self._peers = [Peer(**peer) for peer in self.all_gather(asdict(self._answering.peer), "peers")]
        if self.leads_node and self.nodes > 1:
            following = self._peers[(self.node + 1) % self.nodes * self.local_world]
            try:
                self._watch = Watch(following, self._on_silence)
            except OSError as error:
                raise DistError(
                    f"rank {self.rank} on {node_name()} cannot reach {describe([following])} at "
                    f"{following.host}:{following.port}: {error}"
                ) from error

    def _on_silence(self, happened: str) -> NoReturn:
        """Ends this process: its main thread may wait in a collective (of NCCL too) for ever, and cannot be woken."""
        lost = self.lost_peers() or "; but all ranks answer again"
        say_last(f"PeerError: rank {self.rank}: {happened}, at {self.where}{lost}")
        os._exit(1)

    @contextmanager
    def _speaking(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:300]
            raise PeerError(
                f"rank {self.rank}: {operation} failed at {self.where}: a peer died or missed the deadline of "
                f"{self.timeout_s:g} s (train.collective_timeout_s){self.lost_peers()}: {reason}"
            ) from error

    def lost_peers(self) -> str:
        """Which ranks are gone and where they ran, as the end of a clause; seconds, so asked after a failure only."""
        lost = silent([peer for peer in self._peers if peer.rank != self.rank])
        return f"; no answer from {describe(lost)}" if lost else ""

    def barrier(self, what: str) -> None:
        """Waits for all ranks."""
        with self._speaking(f"barrier ({what})"):
            dist.all_reduce(torch.zeros(1), group=self._group)

    def sum(self, values: Tensor, what: str) -> Tensor:
        """Element-wise sum over ranks of a CPU float64 tensor, on every rank."""
        total = values.detach().to("cpu", torch.float64).clone()
        with self._speaking(f"all-reduce ({what})"):
            dist.all_reduce(total, group=self._group)
        return total

    def max(self, values: Tensor, what: str) -> Tensor:
        """Element-wise maximum over ranks of a CPU float64 tensor, on every rank."""
        total = values.detach().to("cpu", torch.float64).clone()
        with self._speaking(f"all-reduce max ({what})"):
            dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self._group)
        return total

    def all_reduce_seconds(self, nbytes: int, device: torch.device | None = None) -> float:
        """Seconds of one all-reduce over the control group, or with a device over the default group."""
        values = torch.zeros(nbytes // 4, device=device or "cpu")
        self.barrier("bandwidth")
        started = time.monotonic()
        with self._speaking("all-reduce (bandwidth)"):
            dist.all_reduce(values, group=self._group if device is None else None)
            values[0].item()  # waits for the device
        return time.monotonic() - started

    def seconds_from_node_before(self, nbytes: int) -> float:
        """In which so many bytes came here from the node before; 0 where there is none, and on ranks that lead no node.

        Every other node sends, then the rest: what a slow card sends would hold up its acknowledgements as well.
        """
        before, after = ((self.node + k) % self.nodes for k in (-1, 1))
        seconds = 0.0
        for turn in (0, 1):
            self.barrier("way between nodes")
            if self.nodes == 1 or not self.leads_node:
                continue
            with self._speaking("send (way between nodes)"):
                started = time.monotonic()
                sent = None
                if self.node % 2 == turn:
                    whole = torch.zeros(nbytes, dtype=torch.uint8)
                    sent = dist.isend(whole, after * self.local_world, group=self._group)
                if before % 2 == turn:
                    dist.recv(torch.empty(nbytes, dtype=torch.uint8), before * self.local_world, group=self._group)
                    seconds = time.monotonic() - started
                if sent is not None:
                    sent.wait()
        return seconds

    def all_gather(self, value: Any, what: str) -> list[Any]:
        """Every rank's JSON-able value, in rank order, on every rank."""
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = mine.numel()
        with self._speaking(f"all-gather ({what})"):
            dist.all_reduce(sizes, group=self._group)
            width = int(sizes.max())
            padded = torch.zeros(width, dtype=torch.uint8)
            padded[: mine.numel()] = mine
            rows = [torch.empty(width, dtype=torch.uint8) for _ in range(self.world)]
            dist.all_gather(rows, padded, group=self._group)
        return [json.loads(bytes(row[: int(size)].numpy())) for row, size in zip(rows, sizes, strict=True)]

    def broadcast(self, value: Any, what: str) -> Any:
        """Rank 0's JSON-able value, on every rank."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        with self._speaking(f"broadcast ({what})"):
            dist.broadcast(size, 0, group=self._group)
            if self.rank != 0:
                data = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self._group)
        return json.loads(bytes(data.numpy()))

    def exchange(self, outgoing: Sequence[bytes], what: str) -> list[bytes]:
        """All-to-all: outgoing[r] goes to rank r; returns what each rank sent here, in rank order."""
        if self.world == 1:
            return list(outgoing)
        sent = torch.tensor([len(part) for part in outgoing])
        received = torch.empty_like(sent)
        with self._speaking(f"all-to-all ({what})"):
            dist.all_to_all_single(received, sent, group=self._group)
            source = torch.frombuffer(bytearray(b"".join(outgoing)) or bytearray(1), dtype=torch.uint8)
            target = torch.empty(int(received.sum()), dtype=torch.uint8)
            dist.all_to_all_single(
                target, source[: int(sent.sum())], received.tolist(), sent.tolist(), group=self._group
            )
        return [bytes(part.numpy()) for part in target.split(received.tolist())]

    @property
    def column(self) -> list[int]:
        """The ranks with the local rank of this one, one a node, in the order of the nodes."""
        return list(range(self.local_rank, self.world, self.local_world))

    def column_gather(self, mine: Sequence[Tensor], places: Sequence[Sequence[Tensor]], what: str) -> None:
        """Fills places[node][k] with `mine[k]` of the column's rank on that node, all of them in one all-gather.

        Flat uint8 CPU tensors; `mine[k]` has the same size on all ranks of the column. Gloo flattens what is sent and
        what arrives, so both exist once more meanwhile. Only where there are several nodes.
        """
        with self._speaking(f"all-gather ({what})"):
            self._column.allgather_coalesced([list(row) for row in places], list(mine)).wait()

    def part(self) -> None:
        """After the last collective: from here on the ranks may end one after the other, and nobody misses them."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._answering is not None:
            self._answering.close()
            self._answering = None

    def close(self) -> None:
        """Parts from the others and leaves the groups."""
        self.part()
        if dist.is_initialized():
            dist.destroy_process_group()
