"""SGLang's sampler with two properties that training needs; runs inside SGLang's processes.

A token depends on the request's seed, its position and its distribution only, not on the batch or on what was sampled
before. The returned log-probabilities are those of the distribution that was sampled from, after top-k and top-p
(SGLang's own stop at temperature).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler
from torch import Tensor

from grpo_ds.engine.sampling import draw, restrict_, uniforms


class SeededSampler(Sampler):
    """SGLang computes log-probabilities from `probs` after this step, hence the changes in place."""

    def _sample_from_probs(
        self, probs: Tensor, sampling_info: Any, positions: Tensor, simple_sampling_case: bool
    ) -> tuple[Tensor, None]:
        assert not sampling_info.need_min_p_sampling, "grpo_ds does not offer min_p"
        assert sampling_info.sampling_seed is not None, "the hook that keeps seeds was not applied"
        greedy = sampling_info.top_ks <= 1  # SGLang writes temperature 0 as top_k 1
        likeliest = probs.argmax(-1)
        if not simple_sampling_case:
            # Greedy rows keep the log-probabilities of temperature 1.
            everything = torch.full_like(sampling_info.top_ks, probs.shape[-1])
            restrict_(
                probs,
                torch.where(greedy, everything, sampling_info.top_ks),
                torch.where(greedy, torch.ones_like(sampling_info.top_ps), sampling_info.top_ps),
            )
        tokens = draw(probs, uniforms(sampling_info.sampling_seed, positions))
        return torch.where(greedy, likeliest, tokens).to(torch.int32), None
