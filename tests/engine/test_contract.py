"""What every engine must do, checked against transformers on the same weights."""

from __future__ import annotations

import pytest

from grpo_ds.engine.base import EngineError, Request, SamplingSpec
from tests.engine.bench import MAX_MODEL_LEN, Bench, assert_logprobs_match, prompt, requests
from tests.models import EOS

FREE = SamplingSpec(n=1, max_tokens=24)


def test_greedy_tokens_are_the_arg_max_at_every_position(bench: Bench) -> None:
    spec = SamplingSpec(n=1, max_tokens=24, temperature=0.0)
    for request, (rollout,) in zip(requests(6), bench.engine.generate(requests(6), spec), strict=True):
        assert rollout.token_ids == tuple(bench.logits(request.prompt_token_ids, rollout.token_ids).argmax(-1).tolist())
        assert_logprobs_match(bench, request, rollout, 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_after_temperature(bench: Bench, temperature: float) -> None:
    spec = SamplingSpec(n=3, max_tokens=16, temperature=temperature)
    for request, rollouts in zip(requests(4), bench.engine.generate(requests(4), spec), strict=True):
        assert len(rollouts) == 3
        for rollout in rollouts:
            assert_logprobs_match(bench, request, rollout, temperature)


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_logprobs_are_renormalised_over_the_kept_tokens(bench: Bench, top_k: int) -> None:
    request = requests(1)[0]
    ((rollout,),) = bench.engine.generate([request], SamplingSpec(n=1, max_tokens=16, temperature=1.5, top_k=top_k))
    top = (bench.logits(request.prompt_token_ids, rollout.token_ids) / 1.5).topk(top_k, -1)
    for i, token in enumerate(rollout.token_ids):
        kept = top.indices[i].tolist()
        assert token in kept
        wanted = top.values[i].log_softmax(-1)[kept.index(token)]
        assert rollout.logprobs[i] == pytest.approx(float(wanted), abs=1e-4)


def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_renormalises(bench: Bench) -> None:
    request = requests(1)[0]
    ((rollout,),) = bench.engine.generate([request], SamplingSpec(n=1, max_tokens=16, temperature=1.5, top_p=0.5))
    probs = (bench.logits(request.prompt_token_ids, rollout.token_ids) / 1.5).softmax(-1)
    for row, token, logprob in zip(probs, rollout.token_ids, rollout.logprobs, strict=True):
        ordered = row.sort(descending=True)
        kept = ordered.indices[ordered.values.cumsum(-1) - ordered.values < 0.5]
        assert token in kept
        assert logprob == pytest.approx(float((row[token] / row[kept].sum()).log()), abs=1e-4)


def test_samples_differ_and_repeat_with_their_seed(bench: Bench) -> None:
    spec = SamplingSpec(n=4, max_tokens=12, temperature=1.5)
    first, again = (bench.engine.generate(requests(2), spec) for _ in range(2))
    other = bench.engine.generate(requests(2, seed=7), spec)
    assert len({rollout.token_ids for rollout in first[0]}) == 4
    assert [[r.token_ids for r in rs] for rs in first] == [[r.token_ids for r in rs] for rs in again]
    assert [r.token_ids for r in first[0]] != [r.token_ids for r in other[0]]


def test_neighbouring_seeds_share_no_samples(bench: Bench) -> None:
    spec = SamplingSpec(n=4, max_tokens=12, temperature=1.5)
    pair = [Request(prompt(0), 5, "a"), Request(prompt(0), 6, "b")]
    one, two = bench.engine.generate(pair, spec)
    assert not {r.token_ids for r in one} & {r.token_ids for r in two}


def test_a_sample_does_not_depend_on_its_batch_or_on_n(bench: Bench) -> None:
    batch = bench.engine.generate(requests(6), SamplingSpec(n=4, max_tokens=12, temperature=1.5))
    alone = bench.engine.generate([requests(6)[3]], SamplingSpec(n=2, max_tokens=12, temperature=1.5))
    assert [r.token_ids for r in alone[0]] == [r.token_ids for r in batch[3][:2]]


def test_a_stop_token_ends_the_response_and_belongs_to_it(bench: Bench) -> None:
    ((free,),) = bench.engine.generate(requests(1), FREE)
    stop = free.token_ids[3]
    cut = free.token_ids.index(stop) + 1
    ((rollout,),) = bench.engine.generate(requests(1), SamplingSpec(n=1, max_tokens=24, stop_token_ids=(stop,)))
    assert (rollout.token_ids, rollout.finish_reason) == (free.token_ids[:cut], "stop")
    assert len(rollout.logprobs) == cut


def test_the_models_own_end_token_ends_a_response(bench: Bench) -> None:
    spec = SamplingSpec(n=64, max_tokens=120, temperature=2.0)
    rollouts = bench.engine.generate(requests(1), spec)[0]
    ended = [r for r in rollouts if r.finish_reason == "stop"]
    assert ended, "at this temperature some of 64 responses meet the end token"
    assert all(r.token_ids.index(EOS) == len(r.token_ids) - 1 for r in ended)
    assert all(EOS not in r.token_ids and len(r.token_ids) == 120 for r in rollouts if r.finish_reason == "length")


def test_a_response_ends_where_the_context_does(bench: Bench) -> None:
    request = Request(prompt(1, MAX_MODEL_LEN - 5), 0, "long")
    ((rollout,),) = bench.engine.generate([request], SamplingSpec(n=1, max_tokens=50, temperature=0.0))
    assert (len(rollout.token_ids), rollout.finish_reason) == (5, "length")


def test_a_prompt_that_fills_the_context_is_refused_by_name(bench: Bench) -> None:
    request = Request(prompt(1, MAX_MODEL_LEN + 1), 0, "too-long")
    with pytest.raises(EngineError, match="too-long"):
        bench.engine.generate([request], FREE)
    assert bench.engine.alive()


def test_no_requests_give_no_rollouts(bench: Bench) -> None:
    assert bench.engine.generate([], FREE) == []
