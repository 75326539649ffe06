"""What only the SGLang engine promises, on real servers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_ds.engine.base import EngineError, Request, SamplingSpec
from tests.engine.bench import Bench, assert_logprobs_match, make_model, new_engine, new_server, prompt, requests
from tests.engine.test_flight import computing
from tests.engine.test_process import descendants, gone, wait_for
from tests.engine.test_update import Sender, publish
from tests.models import save_model

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


@pytest.fixture
def packer() -> Iterator[Sender]:
    made = Sender(2**20)
    yield made
    os.close(made.fd)


def raw(bench: Bench, path: str, body: dict[str, Any]) -> Any:
    engine: Any = bench.engine
    return engine._server.post(path, body).json()


def test_the_responses_of_a_prompt_share_its_keys_and_values(sglang_tied: Bench) -> None:
    engine: Any = sglang_tied.engine
    bodies = engine._generate_bodies(Request(prompt(77, 100), 0, "a"), SamplingSpec(n=4, max_tokens=2))
    answers = [raw(sglang_tied, "/generate", body) for body in bodies]
    assert [output["meta_info"]["cached_tokens"] for output in answers[-1]] == [99] * 4


def test_greedy_and_restricted_requests_in_one_batch_keep_their_own_rules(sglang_tied: Bench) -> None:
    greedy = SamplingSpec(n=1, max_tokens=100, temperature=0.0)
    with ThreadPoolExecutor(2) as threads:
        sampling = threads.submit(
            sglang_tied.engine.generate, requests(4), SamplingSpec(n=8, max_tokens=100, temperature=1.5, top_k=3)
        )
        answers = sglang_tied.engine.generate(requests(4), greedy)
        sampling.result()
    for request, (rollout,) in zip(requests(4), answers, strict=True):
        logits = sglang_tied.logits(request.prompt_token_ids, rollout.token_ids)
        assert rollout.token_ids == tuple(logits.argmax(-1).tolist())
        assert_logprobs_match(sglang_tied, request, rollout, 1.0)


def test_the_cache_is_not_flushed_silently_in_vain(sglang_tied: Bench) -> None:
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(sglang_tied.engine.generate, requests(8), SamplingSpec(n=8, max_tokens=200))
        time.sleep(0.5)
        with pytest.raises(EngineError, match="/flush_cache was refused"):
            sglang_tied.engine.flush_cache()
        running.result()


def test_an_update_without_a_parameter_of_the_model_is_refused_by_its_name(sglang_tied: Bench, packer: Sender) -> None:
    named = [(name, tensor) for name, tensor in sglang_tied.model.named_parameters() if name != "model.norm.weight"]
    engine = sglang_tied.engine
    engine.pause()
    engine.begin_update([name for name, _ in named])
    engine.update_bucket(packer.pack(named))
    with pytest.raises(EngineError, match=r"1 parameters .* not reached .* model.norm.weight"):
        engine.finish_update(40)
    assert engine.version() != 40
    publish(sglang_tied, packer, 41)
    ((rollout,),) = engine.generate(requests(1), SamplingSpec(n=1, max_tokens=8))
    assert_logprobs_match(sglang_tied, requests(1)[0], rollout, 1.0)


def test_nothing_survives_a_killed_guard(tmp_path: Path) -> None:
    engine: Any = new_server("sglang", save_model(make_model(tied=True), tmp_path / "model"), tmp_path)
    engine.start()
    try:
        guard = psutil.Process(engine._server.process.pid)
        wait_for("SGLang's own processes", lambda: len(descendants(guard.pid)) >= 3, 600)
        time.sleep(2)  # until they have run the first lines of the launcher
        family = descendants(guard.pid)
        os.kill(guard.pid, signal.SIGKILL)
        wait_for("the end of the server's processes", lambda: gone(family), 20)
    finally:
        engine.close()


@pytest.mark.slow
def test_a_pool_of_two_answers_every_request_when_one_hangs_and_when_one_dies(tmp_path: Path) -> None:
    """The scheduler of one server is stopped while it generates; once that one is replaced, the other one's is killed."""
    model = make_model(tied=True)
    pool: Any = new_engine(
        *("sglang", save_model(model, tmp_path / "model"), tmp_path), replicas=2, max_restarts=4, stall_timeout_s=10
    )
    bench, spec = Bench(pool, model), SamplingSpec(n=2, max_tokens=200)
    pool.start()
    try:
        pool.wait_ready()
        for signum, victim in ((signal.SIGSTOP, 0), (signal.SIGKILL, 1)):
            with ThreadPoolExecutor(1) as threads:
                running = threads.submit(pool.generate, requests(120), spec)
                time.sleep(1)
                assert not running.done()
                computing(pool._replicas.all[victim].engine).send_signal(signum)
                answers = running.result(timeout=400)
            for request, rollouts in zip(requests(120), answers, strict=True):
                assert [rollout.finish_reason for rollout in rollouts if rollout.finish_reason == "abort"] == []
                for rollout in rollouts:
                    assert_logprobs_match(bench, request, rollout, 1.0)
            counts = pool.take_counts()
            assert counts["quarantined"] == 1 and counts["redone_requests"] > 0
            if victim == 0:
                wait_for("the restarted server", pool.needs_weights, 300)
                sender = Sender(2**20)
                publish(bench, sender, 0)
                os.close(sender.fd)
    finally:
        pool.close()
