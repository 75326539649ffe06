"""What the ranks and the tests agree on: tiny models, samples, rollouts, the list of gradient cases. No formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo_ds.types import Sample
from tests.models import tiny_qwen3

Placement = Literal["", "loss", "reward"]
"""Where the KL to the reference stands; "": nowhere."""
TEMPERATURE = 0.7
VOCABULARY = 61
MAX_RESPONSE_TOKENS = 16
LOSSES = ("vanilla", "gspo", "cispo", "sapo", "gmpo", "gpg", "reinforce")
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
PLACEMENTS: tuple[Placement, ...] = ("", "loss", "reward")
KL_COEF = 0.3

LENGTHS = (24, 23, 14, 17, 13, 24, 15, 22, 20)
"""No two fit a micro-batch of TIGHT tokens, so 9 samples make 10 micro-batches on 2 ranks and 12 on 4."""
GROUPS = (0, 0, 0, 1, 1, 1, 2, 2, 3)
WITHOUT_RESPONSE = 4
TIGHT = 24
FEW = 3
"""With so many samples one of 4 ranks has nothing but an empty micro-batch."""
PROMPT_TOKENS = 8
UNSCORED, TRUNCATED = 1, 4
"""Of the rollouts, which have the same lengths and groups: one without a reward, and one that was cut off."""

SPREADS = (("grpo", "k1"), ("reinforce_plus_plus", "k3"), ("grpo", "abs"), ("reinforce_plus_plus", "k2"))
"""(estimator, KL estimate) where the KL is placed in the reward."""
KINDS = ("k3", "k1", "abs", "k2", "k3+", "k1+", "abs+")
"""KL estimates where the KL is placed in the loss; the estimator is not used there."""
GAMMA = 0.9
CUTS = tuple(product((TIGHT, 64, 1000), ("padded", "packed"), (0, 7)))
"""(budget of a micro-batch, layout, seed of the packing order)."""


@dataclass(frozen=True)
class GradientCase:
    """The gradient of one optimizer step; with the KL in the reward, those of the two steps of a round."""

    loss: str = "vanilla"
    mode: str = "token-mean"
    kl: Placement = ""
    spread: tuple[str, str] = ("grpo", "k3")
    """(estimator, KL estimate)."""
    budget: int = TIGHT
    layout: str = "padded"
    shuffle: int = 0
    """Seed of the order of the samples, of the micro-batches and of who gets which; 0: as the plan has it."""
    importance: tuple[str, str] = ("token", "truncate")
    model: str = "untied"
    few: bool = False
    config: str = "partitioned"
    old: bool = True
    """Old log-probabilities are given; False: the ones being differentiated."""
    mistake: str = ""
    """A deliberate error, to see that the comparison notices it; MISTAKES has them all."""

    @property
    def name(self) -> str:
        """Test id."""
        parts = [
            self.loss,
            self.mode,
            self.kl and f"kl-{self.kl}",
            str(self.budget),
            self.layout,
            self.model,
            self.config,
        ]
        parts += [f"shuffle{self.shuffle}" if self.shuffle else "", "few" if self.few else "", self.mistake]
        parts += ["-".join(self.importance), "" if self.old else "on-policy"]
        parts += {"reward": self.spread, "loss": self.spread[1:], "": ()}[self.kl]
        return "/".join(p for p in parts if p)

    @property
    def truth(self) -> tuple[Any, ...]:
        """Cases with equal truth have the same gradient."""
        return self.loss, self.mode, self.kl, self.spread, self.importance, self.model, self.few, self.old


def split_cases() -> list[GradientCase]:
    """Every cut of the same step: micro-batch sizes, layouts, packing orders."""
    plain, loss = GradientCase(), GradientCase(mode="seq-mean-token-mean", kl="loss")
    cases = [cut_as(case, cut) for cut in CUTS for case in (plain, loss)]
    cases += [GradientCase(mode="seq-mean-token-mean", kl="loss", few=True, layout=y) for y in ("padded", "packed")]
    return cases


def other_cases() -> list[GradientCase]:
    """Every kind of importance weight, one step a round, tied head, other ZeRO settings."""
    kinds = [("off", "truncate"), ("token", "mask"), ("sequence", "truncate"), ("sequence", "mask")]
    cases = [GradientCase(importance=kind) for kind in kinds]
    cases += [GradientCase(loss=n, old=False) for n in LOSSES]
    cases += [GradientCase(model="tied", budget=b) for b in (TIGHT, 1000)]
    cases += [GradientCase(config="zero3.json", kl="loss", budget=b) for b in (TIGHT, 1000)]
    return cases


def combinations() -> list[GradientCase]:
    """Every loss x aggregation x KL placement; each aggregation meets every KL estimate, each loss four of them."""
    return [
        GradientCase(loss=n, mode=m, kl=kl, spread=spread_of(kl, LOSSES.index(n) + MODES.index(m)))
        for kl, n, m in product(PLACEMENTS, LOSSES, MODES)
    ]


def spread_of(kl: Placement, index: int) -> tuple[str, str]:
    """(estimator, KL estimate) number `index`, around and around."""
    if kl == "reward":
        return SPREADS[index % len(SPREADS)]
    return ("grpo", KINDS[index % len(KINDS) if kl else 0])


def cut_as(case: GradientCase, cut: tuple[int, str, int]) -> GradientCase:
    """The same step in other micro-batches."""
    return replace(case, budget=cut[0], layout=cut[1], shuffle=cut[2])


def rotated_cases(world: int) -> list[GradientCase]:
    """Each combination under one cut; the whole product takes minutes.

    On 2 ranks all of them: every loss, every aggregation and every placement meets every cut. On 1 and on 4 a third, in
    which every loss meets every aggregation and every placement, and every aggregation every placement.
    """
    share, offset = {1: (3, 0), 2: (1, 0), 4: (3, 1)}[world]
    return [
        cut_as(case, CUTS[(3 * k + k // len(MODES) + world) % len(CUTS)])
        for k, case in enumerate(combinations()[offset::share])
    ]


def product_cases() -> list[GradientCase]:
    """Everything with everything: every combination under every cut, and with one loss every KL estimate as well."""
    kinds = [GradientCase(mode=m, kl="loss", spread=("grpo", kind)) for m in MODES for kind in KINDS]
    spreads = [GradientCase(mode=m, kl="reward", spread=spread) for m in MODES for spread in SPREADS]
    return [cut_as(case, cut) for case in dict.fromkeys(combinations() + kinds + spreads) for cut in CUTS]


MISTAKES = [
    GradientCase(mistake="unscaled"),
    GradientCase(mistake="local_totals"),
    *(
        GradientCase(kl="reward", spread=s, mistake=m)
        for m in ("mixed_penalties", "lost_penalties")
        for s in SPREADS[:2]
    ),
]
"""Without the factor W; denominators of the rank alone; penalties come home in another order; those that one rank
computed are missing."""


def gradient_cases(world: int) -> list[GradientCase]:
    """The cases run on `world` ranks."""
    on_policy = [GradientCase(kl="reward", spread=s, old=False, budget=64, layout="packed") for s in SPREADS[:2]]
    extra = other_cases() + MISTAKES if world == 2 else []
    return list(dict.fromkeys(split_cases() + rotated_cases(world) + on_policy + extra))


def make_model(folder: Path, *, tied: bool) -> None:
    """A Qwen3 of 2 layers whose sizes are odd, so that no shard is even."""
    model = tiny_qwen3(
        seed=11,
        tied=tied,
        vocab_size=VOCABULARY,
        hidden_size=33,
        intermediate_size=47,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("norm.weight"):
                param.add_(0.2 * torch.randn_like(param))
    model.save_pretrained(folder)


def make_neighbour(model: Path, folder: Path, *, seed: int, scale: float) -> None:
    """A model whose weights lie close to another's: the policy at the start of a round, or a reference."""
    random = torch.Generator().manual_seed(seed)
    other = read_model(model, torch.float32)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(scale * torch.randn(param.shape, generator=random))
    other.save_pretrained(folder)


def read_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model as plain transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


@torch.no_grad()
def make_samples(model: Any) -> list[dict[str, Tensor]]:
    """Sequences with gaps in their response masks; old, rollout and reference log-probs scatter around the model's."""
    random = torch.Generator().manual_seed(5)

    def noise(scale: float, length: int) -> Tensor:
        return scale * torch.randn(length, generator=random)

    out = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(2, VOCABULARY, (length,), generator=random)
        mask = (torch.arange(length) >= 4 + i % 3) & (torch.rand(length, generator=random) < 0.8)
        if i == WITHOUT_RESPONSE:
            mask = torch.zeros(length, dtype=torch.bool)
        log_p = (model(ids[None], use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        own = torch.zeros(length)
        own[1:] = log_p[:-1].gather(1, ids[1:, None]).squeeze(1).float()
        old = own + noise(0.3, length)
        out.append(
            {
                "token_ids": ids,
                "response_mask": mask,
                "rollout_logprobs": torch.where(mask, old + noise(0.4, length), 0.0),
                "advantages": torch.where(mask, noise(1.0, length), 0.0),
                "versions": torch.where(mask, 0, -1),
                "old": old,
                "ref": own + noise(0.4, length),
            }
        )
    return out


@torch.no_grad()
def make_rollouts(start: Any) -> list[dict[str, Tensor]]:
    """Scored responses to the prompts of GROUPS, sampled by something close to the policy `start`; nan: no reward."""
    random = torch.Generator().manual_seed(8)
    prompts = torch.randint(2, VOCABULARY, (len(set(GROUPS)), PROMPT_TOKENS), generator=random)
    out = []
    for i, (group, length) in enumerate(zip(GROUPS, LENGTHS, strict=True)):
        answer = torch.randint(2, VOCABULARY, (length - PROMPT_TOKENS,), generator=random)
        ids = torch.cat([prompts[group], answer])
        log_p = (start(ids[None], use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        own = log_p[PROMPT_TOKENS - 1 : -1].gather(1, answer[:, None]).squeeze(1).float()
        reward = torch.randn((), generator=random)
        out.append(
            {
                "token_ids": ids,
                "response_mask": torch.arange(length) >= PROMPT_TOKENS,
                "rollout_logprobs": torch.cat(
                    [torch.zeros(PROMPT_TOKENS), own + 0.4 * torch.randn(len(own), generator=random)]
                ),
                "reward": torch.tensor(torch.nan) if i == UNSCORED else reward,
            }
        )
    return out


def as_sample(raw: dict[str, Tensor], prompt_index: int) -> Sample:
    """The project's own type."""
    return Sample(prompt_index, **{k: v for k, v in raw.items() if k not in ("old", "ref")})


def make_inputs(folder: Path) -> None:
    """Model folders and samples, for ranks to read."""
    for tied in (False, True):
        make_model(folder / ("tied" if tied else "untied"), tied=tied)
    # Log-probabilities then differ by about 0.2 and 0.4: some ratios are clipped, no exponential swells rounding errors.
    make_neighbour(folder / "untied", folder / "start", seed=0, scale=0.004)
    make_neighbour(folder / "untied", folder / "reference", seed=1, scale=0.008)
    torch.save(make_samples(read_model(folder / "untied", torch.float64)), folder / "samples.pt")
    torch.save(make_rollouts(read_model(folder / "start", torch.float64)), folder / "rollouts.pt")


def read_samples(folder: Path) -> list[dict[str, Tensor]]:
    """The samples of `make_inputs`."""
    raw: list[dict[str, Tensor]] = torch.load(folder / "samples.pt", weights_only=True)
    return raw


def read_rollouts(folder: Path) -> list[dict[str, Tensor]]:
    """The rollouts of `make_inputs`."""
    raw: list[dict[str, Tensor]] = torch.load(folder / "rollouts.pt", weights_only=True)
    return raw
