"""Tiny models, and an engine beside the transformers model that holds the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from grpo_ds.config import EngineConfig
from grpo_ds.engine import make_engine, make_server
from grpo_ds.engine.base import EngineSettings, GenerationEngine, RawRollout, Request
from tests.models import WORDS, save_model, tiny_qwen3

MAX_MODEL_LEN = 256


def make_model(tied: bool, seed: int = 0) -> Any:
    """A random Qwen3 of 0.1M parameters."""
    model = tiny_qwen3(
        seed=seed,
        tied=tied,
        vocab_size=WORDS + 2,  # servers pad it: rows that no update brings
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    return model.eval()


class Bench:
    """An engine and the transformers model that holds the same weights."""

    def __init__(self, engine: GenerationEngine, model: Any) -> None:
        self.engine = engine
        self.model = model

    @torch.no_grad()
    def logits(self, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        """(R, V) logits that predict each response token."""
        ids = torch.tensor([[*prompt, *response]])
        return self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


def new_engine(kind: str, model_path: str, folder: Path, **config: Any) -> GenerationEngine:
    """What a run gets: the pool of its servers, or hf."""
    return make_engine(
        EngineConfig(kind=kind, start_timeout_s=600, **config),
        model_path=model_path,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        log_dir=folder,
        device="cpu",
        seed=0,
    )


def new_server(kind: str, model_path: str, folder: Path, url: str | None = None, **config: Any) -> Any:
    """A server without a pool around it, so that a test sees its failures and goes on with it."""
    settings = EngineSettings(model_path, "float32", MAX_MODEL_LEN, folder, "cpu", 0, url=url)
    return make_server(EngineConfig(kind=kind, start_timeout_s=600, **config), settings)


def start_bench(kind: str, tied: bool, folder: Path) -> Bench:
    """The engine is started but perhaps not ready."""
    model = make_model(tied)
    path = save_model(model, folder / "model")
    engine = new_engine(kind, path, folder) if kind == "hf" else new_server(kind, path, folder)
    engine.start()
    return Bench(engine, model)


def prompt(seed: int, length: int = 40) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, WORDS) for _ in range(length))


def requests(count: int, seed: int = 100) -> list[Request]:
    return [Request(prompt(i), seed + i, f"p{i}") for i in range(count)]


def assert_logprobs_match(bench: Bench, request: Request, rollout: RawRollout, temperature: float) -> None:
    logits = bench.logits(request.prompt_token_ids, rollout.token_ids)
    wanted = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(rollout.token_ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), wanted, atol=1e-4, rtol=0)
