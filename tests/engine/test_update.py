"""Weight updates through shared memory and through a group: after each one the engine is exactly the new policy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grpo_ds.engine.base import EngineError, SamplingSpec
from grpo_ds.sync.group import GroupCarrier
from grpo_ds.sync.receive import checksum, host_bytes
from grpo_ds.types import VersionSpan
from tests.engine.bench import Bench, assert_logprobs_match, requests
from tests.engine.conftest import SGLANG

GREEDY = SamplingSpec(n=1, max_tokens=12, temperature=0.0)


class Sender:
    """Packs tensors into one memory file that is overwritten for every bucket, as the trainer does."""

    carrier = None

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("test_bucket")
        self.nbytes = nbytes
        os.ftruncate(self.fd, nbytes)

    def pack(self, named: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        os.pwrite(self.fd, b"\xff" * self.nbytes, 0)  # NaN wherever an engine still looks at the last bucket
        tensors, sums, offset = [], {}, 0
        for name, tensor in named:
            data = tensor.detach().contiguous().numpy().tobytes()
            os.pwrite(self.fd, data, offset)
            tensors.append({"name": name, "offset": offset, "dtype": "float32", "shape": list(tensor.shape)})
            sums[name] = checksum(data)
            offset += len(data)
        path = f"/proc/{os.getpid()}/fd/{self.fd}"
        return {"path": path, "nbytes": self.nbytes, "tensors": tensors, "sums": sums}


class GroupSender:
    """Packs tensors into memory of its own, from where they go to the engine's workers over gloo."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8)
        self.carrier = GroupCarrier(self.memory, "cpu", 120.0)

    def pack(self, named: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        self.memory.fill_(0xFF)
        start, offset, tensors, sums = 256, 0, [], {}
        for name, tensor in named:
            data = tensor.detach().contiguous().flatten().view(torch.uint8)
            self.memory[start + offset : start + offset + data.numel()] = data
            tensors.append({"name": name, "offset": offset, "dtype": "float32", "shape": list(tensor.shape)})
            sums[name] = checksum(host_bytes(data))
            offset += data.numel()
        return {"start": start, "nbytes": offset, "tensors": tensors, "sums": sums}


Case = tuple[Bench, Sender | GroupSender]


def ways() -> Iterator[Any]:
    """Every engine with every transport it knows."""
    yield from (pytest.param(f"hf_{kind}/shared_memory") for kind in ("tied", "untied"))
    for kind in ("vllm", "sglang"):
        for head in ("tied", "untied"):
            for transport in ("shared_memory", "group"):
                yield pytest.param(f"{kind}_{head}/{transport}", marks=SGLANG if kind == "sglang" else ())


@pytest.fixture(params=ways())
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name, transport = request.param.split("/")
    bench = request.getfixturevalue(name)
    if transport == "group":
        yield bench, GroupSender(2**20)
        return
    made = Sender(2**20)
    yield bench, made
    os.close(made.fd)


def perturb(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def split(named: list[tuple[str, torch.Tensor]], parts: int) -> list[list[tuple[str, torch.Tensor]]]:
    """Round robin: q, k and v of one fused layer fall into different buckets."""
    return [named[i::parts] for i in range(parts)]


def publish(bench: Bench, sender: Sender | GroupSender, version: int) -> None:
    named = list(bench.model.named_parameters())
    bench.engine.pause()
    bench.engine.begin_update([name for name, _ in named])
    for part in split(named, 3):
        bench.engine.update_bucket(sender.pack(part), sender.carrier)
    sender.pack([])
    bench.engine.finish_update(version)
    bench.engine.flush_cache()
    bench.engine.resume()


def assert_engine_is_policy(bench: Bench, version: int) -> None:
    for request, (rollout,) in zip(requests(4), bench.engine.generate(requests(4), GREEDY), strict=True):
        logits = bench.logits(request.prompt_token_ids, rollout.token_ids)
        assert rollout.token_ids == tuple(logits.argmax(-1).tolist())
        assert_logprobs_match(bench, request, rollout, 1.0)
        assert rollout.spans == (VersionSpan(version, 0, len(rollout.token_ids)),)
    assert bench.engine.version() == version


def test_three_updates_in_split_buckets_make_the_engine_the_new_policy(case: Case) -> None:
    bench, sender = case
    before = bench.engine.generate(requests(4), GREEDY)
    for version in (1, 2, 3):
        perturb(bench.model, version)
        publish(bench, sender, version)
        # The same prompts as before: cached keys and values of the older policy would show.
        assert_engine_is_policy(bench, version)
    assert bench.engine.generate(requests(4), GREEDY) != before


def test_an_update_is_refused_while_a_tensor_is_missing_and_can_then_be_completed(case: Case) -> None:
    bench, sender = case
    perturb(bench.model, 4)
    named = list(bench.model.named_parameters())
    bench.engine.pause()
    bench.engine.begin_update([name for name, _ in named])
    bench.engine.update_bucket(sender.pack(named[:-1]), sender.carrier)
    with pytest.raises(EngineError, match=named[-1][0]):
        bench.engine.finish_update(4)
    bench.engine.update_bucket(sender.pack(named[-1:]), sender.carrier)
    bench.engine.finish_update(4)
    bench.engine.flush_cache()
    bench.engine.resume()
    assert_engine_is_policy(bench, 4)


def test_a_corrupted_bucket_is_refused_and_the_next_update_repairs_the_engine(case: Case) -> None:
    bench, sender = case
    perturb(bench.model, 5)
    named = list(bench.model.named_parameters())
    bench.engine.pause()
    bench.engine.begin_update([name for name, _ in named])
    bench.engine.update_bucket(sender.pack(named[:3]), sender.carrier)
    bucket = sender.pack(named[3:])
    bucket["sums"][named[5][0]] += 1
    with pytest.raises(EngineError, match="checksum"):
        bench.engine.update_bucket(bucket, sender.carrier)
    publish(bench, sender, 5)
    assert_engine_is_policy(bench, 5)


def test_a_tensor_of_the_wrong_name_or_shape_is_refused(case: Case) -> None:
    bench, sender = case
    named = list(bench.model.named_parameters())
    name, tensor = named[-1]
    names = [name for name, _ in named]
    bench.engine.pause()
    bench.engine.begin_update(names)
    with pytest.raises(EngineError, match="not in the list"):
        bench.engine.update_bucket(sender.pack([("model.nonsense.weight", tensor)]), sender.carrier)
    bench.engine.begin_update(names)
    with pytest.raises(EngineError):
        bench.engine.update_bucket(sender.pack([(name, tensor[:-1])]), sender.carrier)
    publish(bench, sender, 6)
    assert_engine_is_policy(bench, 6)


FUSED = "model.layers.1.self_attn.v_proj.weight"
"""Both servers hold it in one matrix with q and k."""
ALONE = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("lacking", [FUSED, ALONE])
def test_a_tensor_of_the_engine_that_no_update_announced_is_missed_by_the_engine_itself(
    case: Case, lacking: str
) -> None:
    """The trainer's model lacks what the engine's has: all that was announced arrives, and still it is refused."""
    bench, sender = case
    perturb(bench.model, 7)
    named = [(name, tensor) for name, tensor in bench.model.named_parameters() if name != lacking]
    bench.engine.pause()
    with pytest.raises(EngineError, match=r"layers\.[01]\.(self_attn\.(qkv|v)_proj|mlp\.down_proj)\.weight"):
        bench.engine.begin_update([name for name, _ in named])
        bench.engine.update_bucket(sender.pack(named), sender.carrier)
        bench.engine.finish_update(7)
    publish(bench, sender, 7)
    assert_engine_is_policy(bench, 7)
