"""Tokens a second through our engine layer and from vLLM's offline API: python tests/benchmarks/generation.py

Both get the same settings, prompts and seeds, so they do the same work; the sampled tokens are compared. They run in
turns, each in processes of its own, the other one idle. Every turn has new prompts, so none is cached.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from grpo_ds.config import EngineConfig  # noqa: E402
from grpo_ds.engine import make_engine  # noqa: E402
from grpo_ds.engine.base import EngineSettings, GenerationEngine, Request, SamplingSpec  # noqa: E402
from grpo_ds.engine.vllm import server_environment  # noqa: E402
from grpo_ds.engine.vllm_wire import generate_body, server_args  # noqa: E402

GOAL = 0.95
VOCABULARY = 4096
BATCHING = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "enable_chunked_prefill": False}
"""Stated, because vLLM's defaults for servers and for the offline API differ. On CPU vLLM 0.32.0 dies when it splits the
prompt of a request that has a seed ("CPU Generator does not use offset")."""
SERVER_ONLY = {"enable_scale_out", "disable_uvicorn_access_log", "worker_extension_cls", "weight_transfer_config"}
Answers = list[list[tuple[int, ...]]]


def make_model(hidden: int, layers: int, path: Path) -> float:
    """A random Llama in float32; returns millions of parameters."""
    from transformers import LlamaConfig

    from tests.models import random_model, save_model

    model = random_model(
        LlamaConfig,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    save_model(model, path)
    return float(sum(p.numel() for p in model.parameters())) / 1e6


def turn(index: int, options: argparse.Namespace) -> tuple[list[Request], SamplingSpec]:
    """The work of one turn; turns share no prompt."""
    rng = random.Random(index)
    requests = [
        Request(tuple(rng.randrange(3, VOCABULARY) for _ in range(options.prompt_tokens)), k, f"turn-{index}-{k}")
        for k in range(options.prompts)
    ]
    return requests, SamplingSpec(n=options.n, max_tokens=options.max_tokens)


def count(answers: Answers) -> int:
    """Sampled tokens."""
    return sum(len(tokens) for row in answers for tokens in row)


def digest(answers: Answers) -> str:
    """Equal for equal tokens."""
    return hashlib.sha256(repr(answers).encode()).hexdigest()


# ---- the bare engine, in a process of its own ----


def bare(options: argparse.Namespace, args: list[str]) -> None:
    """For each line on stdin, do that turn and print a JSON line. `args`: the server's own command line."""
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known, _ = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(args)
    given = {word[2:].replace("-", "_").removeprefix("no_") for word in args if word.startswith("--")} - SERVER_ONLY
    llm = LLM(**{name: getattr(known, name) for name in given})
    print("READY", flush=True)
    for line in sys.stdin:
        requests, spec = turn(int(line), options)
        prompts: Any = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        bodies = [generate_body(request, spec)["sampling_params"] for request in requests]
        start = time.perf_counter()
        outputs = llm.generate(prompts, [SamplingParams(**body) for body in bodies], use_tqdm=False)
        answers = [[tuple(choice.token_ids) for choice in output.outputs] for output in outputs]
        seconds = time.perf_counter() - start
        print("TURN " + json.dumps([count(answers), seconds, digest(answers)]), flush=True)


class Bare:
    """The other end of `bare`."""

    def __init__(self, options: argparse.Namespace, args: list[str], folder: Path) -> None:
        """args: the server's own command line."""
        (folder / "bare.json").write_text(json.dumps([vars(options), args]))
        with open(folder / "bare.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--bare", str(folder / "bare.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=server_environment("cpu"),
                text=True,
            )
        self.log = folder / "bare.log"

    def read(self, word: str) -> str:
        """The rest of the next line that begins with `word`; vLLM writes to stdout as well."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError(f"the bare engine ended:\n{self.log.read_text()[-4000:]}")

    def run(self, index: int) -> tuple[int, float, str]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{index}\n")
        self.process.stdin.flush()
        tokens, seconds, what = json.loads(self.read("TURN "))
        return tokens, seconds, what

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- both ----


def ours(engine: GenerationEngine, index: int, options: argparse.Namespace) -> tuple[int, float, str]:
    """One turn through the engine layer."""
    requests, spec = turn(index, options)
    start = time.perf_counter()
    rows = engine.generate(requests, spec)
    seconds = time.perf_counter() - start
    answers = [[rollout.token_ids for rollout in row] for row in rows]
    return count(answers), seconds, digest(answers)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Print the table."""
    millions = make_model(options.hidden, options.layers, folder / "model")
    config = EngineConfig(kind="vllm", start_timeout_s=400, args=BATCHING)
    length = options.prompt_tokens + options.max_tokens
    settings = EngineSettings(str(folder / "model"), "float32", length, folder, "cpu", 0)
    engine = make_engine(
        config,
        model_path=settings.model_path,
        dtype=settings.dtype,
        max_model_len=length,
        log_dir=folder,
        device="cpu",
        seed=0,
    )
    other = Bare(options, server_args(config, settings), folder)
    try:
        engine.start()
        other.read("READY")
        engine.wait_ready()
        for index in (1001, 1002):  # first batches compile helpers
            ours(engine, index, options)
            other.run(index)
        rows = [(ours(engine, index, options), other.run(index)) for index in range(options.repeats)]
    finally:
        other.close()
        engine.close()
    same = sum(a[2] == b[2] for a, b in rows)
    rates = [statistics.median(row[side][0] / row[side][1] for row in rows) for side in (0, 1)]
    ratio = statistics.median((a[0] / a[1]) / (b[0] / b[1]) for a, b in rows)
    print(
        f"{millions:.1f}M parameters, {options.prompts} prompts of {options.prompt_tokens} tokens x n={options.n} x at most "
        f"{options.max_tokens} tokens, medians of {options.repeats}, {os.cpu_count()} cores"
    )
    print(f"{'our engine layer':<24}{rates[0]:>9.0f} tokens/s")
    print(f"{'bare vllm.LLM.generate':<24}{rates[1]:>9.0f} tokens/s")
    print(f"{'same tokens':<24}{same:>9} of {options.repeats} turns")
    print(f"{'ratio, turn by turn':<24}{ratio:>9.3f}   goal at least {GOAL}: {'met' if ratio >= GOAL else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bare", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        saved, args = json.loads(Path(options.bare).read_text())
        bare(argparse.Namespace(**saved), args)
        return
    with tempfile.TemporaryDirectory() as name:
        measure(options, Path(name))


if __name__ == "__main__":
    main()
