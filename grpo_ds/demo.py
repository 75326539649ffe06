"""Build the demo: a small language model and two prompt files, from nothing, on one CPU core.

    python -m grpo_ds.demo --out recipes/demo

writes `model/` (a Hugging Face folder: Qwen3 architecture, 0.74M parameters, character tokenizer), `train.jsonl` and
`heldout.jsonl` (rows `{"prompt": "27+58=", "answer": "85"}`).

How the model is made. It learns sums of two two-digit numbers by plain supervised next-token training (AdamW), in two
phases:

1. `steps` optimizer steps on right answers, until it answers nearly all sums, unseen ones too.
2. A short phase on answers that are wrong ON PURPOSE: each digit is replaced, with probability `slip`, by one of the
   other nine, anew at every visit. The model picks up the habit of slipping. The phase ends at the first check (every
   `check_every` steps, on training sums) where answers sampled at temperature 1 are right at most `target` of the time.

So the model is good at addition and spoiled afterwards: its most likely answer is still mostly right, its sampled
answers mostly wrong. This leaves room that reinforcement learning can fill in a minute, because it has to remove a
habit, not to discover addition. The demo shows that a trainer works; it is no evidence about what GRPO can teach a
model that does not know the task.

Held-out sums are kept out of supervised training and out of train.jsonl in both orders (27+58 and 58+27).
The result depends on `--seed` and `--steps` only, up to the floating-point differences of machines.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
ALPHABET = "0123456789+-*/=()<>.,:;?! \nabcxy"[: 32 - len(SPECIAL_TOKENS)]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    seed: int = 0
    """Seed of the split, the weights, the batches and the slips."""
    steps: int = 800
    """Optimizer steps of the first phase."""
    batch: int = 256
    """Sequences in an optimizer step."""
    lr: float = 3.0e-3
    """Peak learning rate of the first phase: linear warm-up, cosine decay to 0."""
    spoil_lr: float = 2.0e-4
    """Learning rate of the second phase, constant."""
    slip: float = 0.4
    """Probability that a digit of an answer is replaced by another digit in the second phase."""
    target: float = 0.37
    """Sampled accuracy that ends the second phase."""
    spoil_steps: int = 200
    """Most steps of the second phase."""
    check_every: int = 5
    """Steps of the second phase between two checks of the sampled accuracy."""
    train_rows: int = 3000
    """Rows of train.jsonl."""
    heldout_rows: int = 256
    """Rows of heldout.jsonl."""


@dataclass(frozen=True, slots=True)
class Sum:
    """One addition task."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)


def split_sums(settings: DemoSettings) -> tuple[list[Sum], list[Sum]]:
    """(sums for training, held-out sums) out of all pairs of two-digit numbers, each shuffled by the seed.

    A held-out sum appears in training in neither order.
    """
    rng = random.Random(settings.seed)
    pairs = [Sum(left, right) for left in range(10, 100) for right in range(10, 100)]
    rng.shuffle(pairs)
    heldout: list[Sum] = []
    taken: set[tuple[int, int]] = set()
    for pair in pairs:
        if len(heldout) == settings.heldout_rows:
            break
        key = (min(pair.left, pair.right), max(pair.left, pair.right))
        if key not in taken:
            taken.add(key)
            heldout.append(pair)
    training = [pair for pair in pairs if (min(pair.left, pair.right), max(pair.left, pair.right)) not in taken]
    return training, heldout


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of ALPHABET, 32 tokens in all; adds no special tokens by itself."""
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A random float32 model that fits the tokenizer: 4 layers, width 128, heads of 32, 2 key-value heads."""
    torch.manual_seed(seed)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **ids)
    return model.float()


def with_slips(answer: str, slip: float, rng: random.Random) -> str:
    """`answer` with each digit replaced, with probability `slip`, by one of the other nine."""
    return "".join(rng.choice("0123456789".replace(digit, "")) if rng.random() < slip else digit for digit in answer)


def encode_batch(sums: list[Sum], tokenizer: PreTrainedTokenizerFast, slip: float, rng: random.Random) -> Tensor:
    """(2, B, T) int64: token ids, and the labels of the same positions; only answer and end token are learned."""
    rows = []
    for item in sums:
        prompt = tokenizer.convert_tokens_to_ids(list(item.prompt))
        answer = tokenizer.convert_tokens_to_ids(list(with_slips(item.answer, slip, rng)))
        response = [*answer, tokenizer.eos_token_id]
        rows.append(([*prompt, *response], [IGNORED_LABEL] * len(prompt) + response))
    longest = max(len(tokens) for tokens, _ in rows)
    ids = [tokens + [tokenizer.pad_token_id] * (longest - len(tokens)) for tokens, _ in rows]
    labels = [label + [IGNORED_LABEL] * (longest - len(label)) for _, label in rows]
    return torch.tensor([ids, labels], dtype=torch.int64)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth of `steps`, then cosine decay to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_step(model: Qwen3ForCausalLM, batch: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step on a batch of `encode_batch`; returns the loss (nats, mean over answer tokens)."""
    ids, labels = batch
    # Causal attention: tokens left of right-hand padding never see it, so no attention mask is needed.
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


def build_optimizer(model: Qwen3ForCausalLM, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def teach(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], settings: DemoSettings) -> None:
    """First phase, in place: right answers only."""
    rng = random.Random(settings.seed + 1)
    optimizer = build_optimizer(model, settings.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.steps))
    model.train()
    for step in range(1, settings.steps + 1):
        batch = encode_batch(rng.choices(sums, k=settings.batch), tokenizer, 0.0, rng)
        loss = train_step(model, batch, optimizer)
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{settings.steps} loss {loss:.4f}", flush=True)
    model.eval()


def spoil(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], settings: DemoSettings) -> None:
    """Second phase, in place: answers with slips, until sampled accuracy is at most the target."""
    rng = random.Random(settings.seed + 2)
    torch.manual_seed(settings.seed)
    checked = rng.sample(sums, k=256)
    optimizer = build_optimizer(model, settings.spoil_lr)
    for step in range(settings.spoil_steps):
        if step % settings.check_every == 0:
            share = accuracy(model, tokenizer, checked, sampled=True, samples=2)
            print(f"spoil step {step} sampled accuracy {share:.3f}", flush=True)
            if share <= settings.target:
                return
        train_step(model, encode_batch(rng.choices(sums, k=settings.batch), tokenizer, settings.slip, rng), optimizer)


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: list[Sum], *, sampled: bool, samples: int = 1
) -> float:
    """Share of right answers over `samples` answers a sum: drawn at temperature 1, or the most likely ones.

    An answer counts only when the model ends it by itself within 8 tokens. Draws from torch's global generator.
    """
    prompts = [item.prompt for item in sums for _ in range(samples)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=sampled,
        temperature=1.0 if sampled else None,
        top_p=1.0 if sampled else None,
        top_k=0 if sampled else None,
        max_new_tokens=8,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    wanted = [item.answer + "<eos>" for item in sums for _ in range(samples)]
    right = [text.replace("<pad>", "") == want for text, want in zip(texts, wanted, strict=True)]
    return sum(right) / len(right)


def write_rows(path: Path, sums: list[Sum]) -> None:
    lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) + "\n" for item in sums]
    path.write_text("".join(lines), encoding="utf-8")


def build(out: Path, settings: DemoSettings) -> dict[str, float]:
    """Make the demo folder `out`; returns held-out accuracy, `sampled` (mean of 4 answers a sum) and `greedy`."""
    training, heldout = split_sums(settings)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings.seed)
    teach(model, tokenizer, training, settings)
    spoil(model, tokenizer, training, settings)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "model")
    # A fresh one: the tokenizer that made padded batches would save its padding as a default.
    build_tokenizer().save_pretrained(out / "model")
    write_rows(out / "train.jsonl", training[: settings.train_rows])
    write_rows(out / "heldout.jsonl", heldout)
    torch.manual_seed(settings.seed)
    return {
        "sampled": accuracy(model, tokenizer, heldout, sampled=True, samples=4),
        "greedy": accuracy(model, tokenizer, heldout, sampled=False),
    }


def main(argv: list[str] | None = None) -> None:
    defaults = DemoSettings()
    parser = argparse.ArgumentParser(prog="python -m grpo_ds.demo", description="Build the demo model and its data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write model/ and the two .jsonl files to")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps on right answers")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}: give at least 1")
    torch.set_num_threads(1)
    result = build(options.out, DemoSettings(seed=options.seed, steps=options.steps))
    print(f"held-out accuracy: sampled {result['sampled']:.3f}, greedy {result['greedy']:.3f}")


if __name__ == "__main__":
    main()
