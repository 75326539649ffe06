"""Weight updates through shared memory: after each one the engine is exactly the new policy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grpo_ds.engine.base import EngineError, SamplingSpec
from grpo_ds.sync.receive import checksum
from grpo_ds.types import VersionSpan
from tests.engine.bench import Bench, assert_logprobs_match, requests

GREEDY = SamplingSpec(n=1, max_tokens=12, temperature=0.0)


class Sender:
    """Packs tensors into one memory file that is overwritten for every bucket, as the trainer does."""

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


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender(2**20)
    yield made
    os.close(made.fd)


def perturb(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def split(named: list[tuple[str, torch.Tensor]], parts: int) -> list[list[tuple[str, torch.Tensor]]]:
    """Round robin: q, k and v of one fused layer fall into different buckets."""
    return [named[i::parts] for i in range(parts)]


def publish(bench: Bench, sender: Sender, version: int) -> None:
    named = list(bench.model.named_parameters())
    bench.engine.pause()
    bench.engine.begin_update([name for name, _ in named])
    for part in split(named, 3):
        bench.engine.update_bucket(sender.pack(part))
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


def test_three_updates_in_split_buckets_make_the_engine_the_new_policy(any_bench: Bench, sender: Sender) -> None:
    before = any_bench.engine.generate(requests(4), GREEDY)
    for version in (1, 2, 3):
        perturb(any_bench.model, version)
        publish(any_bench, sender, version)
        # The same prompts as before: cached keys and values of the older policy would show.
        assert_engine_is_policy(any_bench, version)
    assert any_bench.engine.generate(requests(4), GREEDY) != before


def test_an_update_is_refused_while_a_tensor_is_missing_and_can_then_be_completed(
    any_bench: Bench, sender: Sender
) -> None:
    perturb(any_bench.model, 4)
    named = list(any_bench.model.named_parameters())
    any_bench.engine.pause()
    any_bench.engine.begin_update([name for name, _ in named])
    any_bench.engine.update_bucket(sender.pack(named[:-1]))
    with pytest.raises(EngineError, match=named[-1][0]):
        any_bench.engine.finish_update(4)
    any_bench.engine.update_bucket(sender.pack(named[-1:]))
    any_bench.engine.finish_update(4)
    any_bench.engine.flush_cache()
    any_bench.engine.resume()
    assert_engine_is_policy(any_bench, 4)


def test_a_corrupted_bucket_is_refused_and_the_next_update_repairs_the_engine(any_bench: Bench, sender: Sender) -> None:
    perturb(any_bench.model, 5)
    named = list(any_bench.model.named_parameters())
    any_bench.engine.pause()
    any_bench.engine.begin_update([name for name, _ in named])
    any_bench.engine.update_bucket(sender.pack(named[:3]))
    bucket = sender.pack(named[3:])
    bucket["sums"][named[5][0]] += 1
    with pytest.raises(EngineError, match="checksum"):
        any_bench.engine.update_bucket(bucket)
    publish(any_bench, sender, 5)
    assert_engine_is_policy(any_bench, 5)


def test_a_tensor_of_the_wrong_name_or_shape_is_refused(any_bench: Bench, sender: Sender) -> None:
    named = list(any_bench.model.named_parameters())
    name, tensor = named[-1]
    names = [name for name, _ in named]
    any_bench.engine.pause()
    any_bench.engine.begin_update(names)
    with pytest.raises(EngineError, match="not in the list"):
        any_bench.engine.update_bucket(sender.pack([("model.nonsense.weight", tensor)]))
    any_bench.engine.begin_update(names)
    with pytest.raises(EngineError):
        any_bench.engine.update_bucket(sender.pack([(name, tensor[:-1])]))
    publish(any_bench, sender, 6)
    assert_engine_is_policy(any_bench, 6)
