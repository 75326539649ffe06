"""How weights travel from a node's ranks to its engine: the three ways, and which one a run takes.

    shared_memory   engine on this node         it maps the memory file that the ranks write
    ipc             engine on this node's GPUs  it opens the GPU memory that the ranks write
    group           engine elsewhere            the node's lead broadcasts its memory in a process group with the workers

All else is the same for the three: buckets, manifests, checksums, the order of a publication.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from grpo_ds.config import EngineConfig, RecipeError, SyncConfig
from grpo_ds.peers import address_towards

Kind = Literal["shared_memory", "ipc", "group"]
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Transport:
    """The way and the reason for it."""

    kind: Kind
    reason: str


def choose_transport(sync: SyncConfig, engine: EngineConfig, device: str) -> Transport:
    """The transport of this node. device: cpu or cuda, of the trainer and its engine.

    Raises RecipeError for a wish that cannot be fulfilled, and for an engine that no route leads to.
    """
    wish = sync.transport
    if engine.kind == "hf":
        if wish not in ("auto", "shared_memory"):
            raise _refused(wish, "engine.kind hf lives in the trainer's own process", "shared_memory or auto")
        return Transport("shared_memory", "the engine is in this process")
    far = [url for url in engine.urls if not on_this_machine(url)]
    if far:
        if wish not in ("auto", "group"):
            raise _refused(wish, f"the server {far[0]} of engine.urls is on another machine", "group or auto")
        return Transport("group", f"{far[0]} is on another machine")
    shared = shares_devices(engine, device)
    if wish == "auto":
        if shared and engine.replicas == 1:
            return Transport("ipc", "the engine shares this node's GPUs")
        each = ", and each of its servers sees GPUs of its own" if shared else ""
        return Transport("shared_memory", f"the engine is on this node{each}")
    if wish == "ipc" and device != "cuda":
        raise _refused(wish, f"the weights of this run are on {device}, not on a GPU", "shared_memory or auto")
    if wish == "ipc" and engine.replicas > 1:
        fact = f"each of engine.replicas {engine.replicas} servers sees GPUs of its own, and the memory lies on one"
        raise _refused(wish, fact, "shared_memory or auto")
    if wish == "group" and shared:
        raise _refused(
            wish, "the engine that the run starts shares its lead's GPU, which NCCL cannot connect to itself", "auto"
        )
    return Transport(wish, "sync.transport says so")


def shares_devices(engine: EngineConfig, device: str) -> bool:
    """Whether the run starts an engine of its own on the accelerators that its ranks compute on."""
    return device != "cpu" and engine.kind != "hf" and not engine.urls


def _refused(wish: str, fact: str, instead: str) -> RecipeError:
    return RecipeError(f"sync.transport is {wish}, but {fact}: set it to {instead}")


def on_this_machine(url: str) -> bool:
    """Whether a server is on this machine. Raises RecipeError when its host is unknown or cannot be reached."""
    host = urlsplit(url).hostname or ""
    if host in _LOOPBACK:
        return True
    try:
        # The way to an address of one's own begins at that address.
        return address_towards(host) in _addresses(host)
    except OSError as error:
        raise RecipeError(f"engine.urls contains {url!r}, which this machine has no way to: {error.strerror}") from None


def _addresses(host: str) -> set[str]:
    return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}


def urls_of_node(urls: Sequence[str], node: int, nodes: int) -> list[str]:
    """The servers that a node drives: its own where they are on loopback, else every nodes-th of the list.

    Raises RecipeError for a list that cannot be shared out.
    """
    local = [url for url in urls if urlsplit(url).hostname in _LOOPBACK]
    if nodes == 1 or len(local) == len(urls):
        return list(urls)
    if local:
        raise RecipeError(
            f"engine.urls mixes {local[0]}, which every node has, with servers for all of the {nodes} nodes: list the "
            "servers under names that mean the same on every node"
        )
    if len(urls) < nodes:
        raise RecipeError(
            f"engine.urls lists {len(urls)} servers for {nodes} nodes: each node drives servers of its own, so list at "
            f"least {nodes}, or run the trainer on fewer nodes"
        )
    return list(urls[node::nodes])
