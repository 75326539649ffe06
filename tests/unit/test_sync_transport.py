"""Which way the weights take, which wishes are refused, and handles of GPU memory as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo_ds.config import EngineConfig, RecipeError, SyncConfig
from grpo_ds.sync import transport
from grpo_ds.sync.receive import pack_handle, unpack_handle
from grpo_ds.sync.transport import choose_transport, on_this_machine, shares_devices, urls_of_node

FAR = "http://far.example:8000"
NEAR = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def _far_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAR has an address that is not this machine's."""
    monkeypatch.setattr(transport, "address_towards", lambda host: "192.0.2.1")
    monkeypatch.setattr(transport, "_addresses", lambda host: {"192.0.2.7"})


@pytest.mark.parametrize(
    ("wish", "engine", "device", "kind"),
    [
        ("auto", {}, "cpu", "shared_memory"),
        ("auto", {}, "cuda", "ipc"),
        ("auto", {"urls": [NEAR]}, "cuda", "shared_memory"),
        ("auto", {"urls": [NEAR, FAR]}, "cpu", "group"),
        ("auto", {"kind": "hf"}, "cuda", "shared_memory"),
        ("auto", {"replicas": 2}, "cuda", "shared_memory"),
        ("auto", {"replicas": 2}, "cpu", "shared_memory"),
        ("shared_memory", {}, "cuda", "shared_memory"),
        ("shared_memory", {"replicas": 2}, "cuda", "shared_memory"),
        ("ipc", {}, "cuda", "ipc"),
        ("group", {}, "cpu", "group"),
        ("group", {"urls": [NEAR]}, "cuda", "group"),
        ("group", {"urls": [FAR]}, "cuda", "group"),
    ],
)
def test_the_place_of_the_engine_decides_and_a_wish_is_heard(
    wish: Any, engine: dict[str, Any], device: str, kind: str
) -> None:
    chosen = choose_transport(SyncConfig(transport=wish), EngineConfig(**engine), device)
    assert chosen.kind == kind
    assert chosen.reason


@pytest.mark.parametrize(
    ("wish", "engine", "device", "reason"),
    [
        (
            "group",
            {"kind": "hf"},
            "cpu",
            "sync.transport is group, but engine.kind hf lives in the trainer's own process",
        ),
        ("ipc", {"kind": "hf"}, "cuda", "sync.transport is ipc, but engine.kind hf"),
        ("shared_memory", {"urls": [FAR]}, "cpu", f"shared_memory, but the server {FAR} of engine.urls is on another"),
        (
            "ipc",
            {"urls": [NEAR, FAR]},
            "cuda",
            f"ipc, but the server {FAR} of engine.urls is on another machine: set it",
        ),
        (
            "ipc",
            {},
            "cpu",
            "ipc, but the weights of this run are on cpu, not on a GPU: set it to shared_memory or auto",
        ),
        (
            "ipc",
            {"replicas": 2},
            "cuda",
            "ipc, but each of engine.replicas 2 servers sees GPUs of its own, and the memory lies on one: set it to shared",
        ),
        ("group", {}, "cuda", "group, but the engine that the run starts shares its lead's GPU"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_refused_with_the_reason(
    wish: Any, engine: dict[str, Any], device: str, reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        choose_transport(SyncConfig(transport=wish), EngineConfig(**engine), device)


def test_several_servers_on_gpus_say_why_they_do_not_get_gpu_memory() -> None:
    chosen = choose_transport(SyncConfig(), EngineConfig(replicas=2), "cuda")
    assert chosen.reason == "the engine is on this node, and each of its servers sees GPUs of its own"
    assert choose_transport(SyncConfig(), EngineConfig(replicas=2), "cpu").reason == "the engine is on this node"


@pytest.mark.parametrize(
    ("engine", "device", "shared"),
    [
        ({}, "cuda", True),
        ({"replicas": 2}, "cuda", True),
        ({}, "cpu", False),
        ({"kind": "hf"}, "cuda", False),
        ({"urls": [NEAR]}, "cuda", False),
    ],
)
def test_an_engine_that_the_run_starts_shares_its_accelerators(
    engine: dict[str, Any], device: str, shared: bool
) -> None:
    assert shares_devices(EngineConfig(**engine), device) is shared


def test_a_host_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=r"'http://no-such-host\.invalid:1', which this machine has no way to"):
        on_this_machine("http://no-such-host.invalid:1")


def test_this_machines_own_names_are_known() -> None:
    assert on_this_machine("http://localhost:1") and on_this_machine("http://[::1]:1")


def test_an_address_of_this_machine_is_no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_addresses", lambda host: {"192.0.2.1"})
    assert on_this_machine(FAR)


def test_servers_elsewhere_are_dealt_out_and_servers_on_loopback_belong_to_every_node() -> None:
    far = [f"http://e{i}:80" for i in range(5)]
    assert [urls_of_node(far, node, 2) for node in (0, 1)] == [[far[0], far[2], far[4]], [far[1], far[3]]]
    assert urls_of_node(far, 0, 1) == far
    assert [urls_of_node([NEAR], node, 2) for node in (0, 1)] == [[NEAR], [NEAR]]
    assert urls_of_node([], 1, 2) == []


@pytest.mark.parametrize(
    ("urls", "reason"), [([FAR], "lists 1 servers for 2 nodes"), ([NEAR, FAR], f"mixes {NEAR}, which every node has")]
)
def test_servers_that_cannot_be_dealt_out_are_refused(urls: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        urls_of_node(urls, 0, 2)


FIELDS = (0, b"\x00handle\xff", 4096, 512, b"counter", 3, b"event", True)


def test_a_handle_survives_json_and_names_the_gpu_as_this_process_does() -> None:
    handle = json.loads(json.dumps(pack_handle(FIELDS, "gpu-b")))
    assert unpack_handle(handle, ["gpu-a", "gpu-b"]) == (1, *FIELDS[1:])


def test_memory_of_a_gpu_that_the_engine_does_not_see_is_refused() -> None:
    with pytest.raises(ValueError, match="on GPU gpu-b, which this engine process does not see"):
        unpack_handle(pack_handle(FIELDS, "gpu-b"), ["gpu-a"])


def test_a_handle_of_another_version_of_torch_is_refused() -> None:
    with pytest.raises(ValueError):
        pack_handle(FIELDS[:-1], "gpu-b")
