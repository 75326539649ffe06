"""The recipe: every setting of a run as frozen dataclasses. No torch here, so mistakes are answered at once.

A recipe is one YAML file with these sections. Unknown keys are refused, impossible combinations are refused with the
reason, and nothing is rewritten silently. `grpo_ds.recipe` reads the file and the command line into a `Recipe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_ds.config_algorithm import AlgorithmConfig
from grpo_ds.config_algorithm import FilterGroupsConfig as FilterGroupsConfig
from grpo_ds.config_algorithm import ImportanceConfig as ImportanceConfig
from grpo_ds.config_reward import RewardConfig as RewardConfig
from grpo_ds.contradictions import contradictions
from grpo_ds.errors import RecipeError as RecipeError
from grpo_ds.errors import require as _require
from grpo_ds.errors import require_from_zero, require_positive
from grpo_ds.lora_config import LoraConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Hugging Face model: a folder (relative to the working directory or to the recipe file) or a hub name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Parameter type of actor, reference and engine; auto: float32 on CPU, bfloat16 on an accelerator."""
    attn_implementation: str = "sdpa"
    """Attention kernel in transformers' words: sdpa, eager, flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    trust_remote_code: bool = False
    """Run Python code that ships inside the model folder. Off, because it is arbitrary code."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train low-rank adapters instead of all weights; engines and hf/ get the merged model."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str
    """Training prompts: a .jsonl, .json or .parquet file, or a hub data set name."""
    heldout: str | None = None
    """Prompts of the before/after table; never trained on."""
    config: str | None = None
    """Configuration of a hub data set that has several (`main` of openai/gsm8k), for `train` and `heldout`."""
    split: str = "train"
    """Split to take when `train` is a hub name."""
    heldout_split: str = "train"
    """Split to take when `heldout` is a hub name."""
    columns: dict[str, str] = field(default_factory=dict)
    """Map from our column names to the file's: {prompt: question} reads the prompt from column `question`."""
    system_prompt: str | None = None
    """System message put before each prompt; turns the chat template on."""
    chat_template: bool | None = None
    """Apply the tokenizer's chat template; null: exactly when the prompt is a list of messages."""
    max_prompt_tokens: int = 2048
    """Rows with longer prompts are refused (`overlong_prompts: drop` leaves them out), in tokens."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What to do with rows above max_prompt_tokens."""
    shuffle: bool = True
    """Permute the rows anew in each epoch, by train.seed."""

    def __post_init__(self) -> None:
        require_positive("data", self, "max_prompt_tokens")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    n: int = 8
    """Responses sampled for each prompt (the group size)."""
    max_response_tokens: int = 1024
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the trainer's log-probabilities are taken at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling; other than 1 is refused while importance correction is on."""
    top_k: int = 0
    """Top-k sampling, 0: off; other than 0 is refused while importance correction is on."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a response, beside the model's own end-of-sequence tokens."""
    prompts_per_batch: int | None = None
    """Prompts generated at a time while a round collects its groups; null: train.prompts_per_round."""

    def __post_init__(self) -> None:
        _require(self.n >= 1, "rollout.n must be at least 1")
        _require(self.max_response_tokens >= 1, "rollout.max_response_tokens must be at least 1")
        _require(
            0 < self.temperature < math.inf,
            "rollout.temperature must be positive: training needs sampled responses",
        )
        require_from_zero("rollout", self, "top_k", zero="off")
        _require(0 < self.top_p <= 1, "rollout.top_p must lie in (0, 1]")
        _require(
            self.prompts_per_batch is None or self.prompts_per_batch >= 1, "rollout.prompts_per_batch must be >= 1"
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    kind: str = "vllm"
    """Generation engine: vllm or sglang (own server process on loopback), or hf (in process, slow, for debugging)."""
    python: str | None = None
    """Python of the environment that holds the engine; null: the trainer's own, for sglang the one beside it that
    `launch/setup.sh --engine sglang` makes."""
    urls: list[str] = field(default_factory=list)
    """Servers that run already (`python -m grpo_ds.engine.serve`, or `.sglang_serve`), instead of starting one; on
    another host only with the same GRPO_DS_ENGINE_KEY in the environment of both. https: the certificate must be one
    that this system trusts."""
    args: dict[str, Any] = field(default_factory=dict)
    """Options of the engine under its own names, e.g. {max_num_seqs: 256}."""
    start_timeout_s: float = 300.0
    """Deadline for the server to answer its first health check, in seconds."""
    request_timeout_s: float = 1800.0
    """Deadline for one generation request, in seconds."""
    replicas: int = 1
    """Servers a node runs; requests wait in one queue, from which each takes its next when it has capacity."""
    max_restarts: int = 0
    """Engine failures a node survives: the server is restarted (one of engine.urls: waited for, start_timeout_s at a
    time) and given the weights; 0: the first one ends the run."""
    stall_timeout_s: float = 300.0
    """Longest silence of a server before it counts as hung (a health check, a step of a weight update), in seconds. A
    server answers between two forward passes, so it must exceed the longest one; vLLM and SGLang themselves allow 300."""
    sleep: bool = False
    """Engine and trainer share GPUs: the engine gives its memory back while the trainer computes."""
    max_memory_drift_gb: float = 1.0
    """With engine.sleep: how much less device memory may be free after a phase than after the same phase of the first
    rounds, in GiB; more ends the run, naming the phase."""

    def __post_init__(self) -> None:
        timeouts = ("start_timeout_s", "request_timeout_s", "stall_timeout_s")
        require_positive("engine", self, *timeouts, "max_memory_drift_gb")
        _require(self.replicas >= 1, "engine.replicas must be at least 1")
        _require(self.max_restarts >= 0, "engine.max_restarts must not be negative")


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    lr: float = 1.0e-6
    """Peak learning rate of AdamW."""
    lr_warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0; constant afterwards."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    adam_eps: float = 1.0e-8
    """AdamW's epsilon."""
    grad_clip: float = 1.0
    """Global gradient norm above which the gradient is scaled down; 0: off."""
    clip_ratio: float = 0.2
    """Both clipping bounds of the ratio, where the next two do not say otherwise."""
    clip_ratio_low: float | None = None
    """Lower clipping bound epsilon_low."""
    clip_ratio_high: float | None = None
    """Upper clipping bound epsilon_high (DAPO's clip-higher: 0.28)."""
    policy_loss_fn: str = "vanilla"
    """Policy loss: a name of entry-point group `grpo_ds.losses`."""
    policy_loss_args: dict[str, Any] = field(default_factory=dict)
    """The policy loss' own options."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How token losses of a whole optimizer step become one number."""
    kl_loss_coef: float = 0.0
    """Weight of the KL to the reference in the loss; 0 loads no reference."""
    kl_loss_type: str = "k3"
    """KL estimator: k1, abs, k2 (mse), k3 (low_var); a trailing + takes k2's gradient."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """loss: kl_loss_coef x KL is added to the token loss. reward: it is taken off the token rewards."""
    kl_target: float | None = None
    """Adapt kl_loss_coef so that the mean KL a token approaches this, in nats; null: fixed."""
    kl_horizon: int = 10000
    """Samples over which an adaptive coefficient changes by its error; a round changes it by no more than that."""
    deepspeed: str = "zero3.json"
    """DeepSpeed's configuration: a file of ds_configs/, or a path."""
    logprob_chunk_tokens: int = 2048
    """Tokens whose logits exist at once; bounds memory at (this x vocabulary)."""

    def __post_init__(self) -> None:
        require_from_zero("actor", self, "lr", "weight_decay", "kl_loss_coef")
        require_from_zero("actor", self, "lr_warmup_steps", zero="no warm-up")
        require_from_zero("actor", self, "grad_clip", zero="no clipping")
        require_positive("actor", self, "adam_eps", "logprob_chunk_tokens")
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"actor.betas is {list(self.betas)}, both must lie in [0, 1)",
        )
        _require(
            self.kl_target is None or (self.kl_target > 0 and self.kl_loss_coef > 0),
            "actor.kl_target must be positive and needs actor.kl_loss_coef > 0 to start from",
        )
        _require(self.kl_horizon >= 1, "actor.kl_horizon must be at least 1")

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """(epsilon_low, epsilon_high)."""
        low = self.clip_ratio if self.clip_ratio_low is None else self.clip_ratio_low
        high = self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high
        return low, high


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    deepspeed: str = "zero_inference.json"
    """DeepSpeed's configuration of the frozen reference: a file of ds_configs/, or a path."""
    path: str | None = None
    """Reference model; null: model.path, with LoRA the policy without its adapters, which takes no memory."""


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    mode: Literal["drain", "keep", "abort"] = "drain"
    """What becomes of requests that still run when a round has its groups. drain: the round waits for them; only this
    is reproducible. keep: they run on beside the trainer, under the new weights after the publication, and become
    groups of a later round, in which tokens that are older than filter_groups.max_staleness by then are masked out of
    the loss. abort: they are ended, and their prompts are asked again in the next round. Both need more prompts
    in flight than a round trains on: rollout.prompts_per_batch above train.prompts_per_round."""
    transport: Literal["auto", "shared_memory", "ipc", "group"] = "auto"
    """How weights reach the engine: through memory of this node (shared_memory), GPU memory (ipc, CUDA's handles), or a
    process group (group: engines elsewhere); auto: what suits the place of the engine, said at the start."""
    bucket_mb: int = 512
    """Size of one of the two transfer buffers of a node, in MiB; a larger module makes both as large as itself (the
    embedding of Llama 70B: 2004). 0: a bucket a module."""
    timeout_s: float = 600.0
    """Deadline of one weight update once the engine has paused, in seconds."""
    verify: Literal["off", "sampled", "full"] = "sampled"
    """Checksums of what the engines read: none, of each tensor in every 16th version, or of all in every version."""
    max_logprob_gap: float = 1.0
    """Largest mean |trainer - engine| log-probability of freshly sampled tokens before the run is stopped, in nats."""
    parity_every: int = 50
    """Rounds between parity gates, which compare both sides on a fixed probe; 0: only the one before the first round."""
    parity_mean: float | None = None
    """Largest mean |trainer - engine| in the probe, in nats; null: 1e-4 in float32, 0.05 in 16 bits."""
    parity_p99: float | None = None
    """Largest 99th percentile of |trainer - engine| in the probe, in nats; null: 1e-3 in float32, 0.5 in 16 bits."""
    parity_max: float | None = None
    """Largest single |trainer - engine| in the probe, in nats; null: 1e-2 in float32, 5 in 16 bits."""

    def __post_init__(self) -> None:
        require_positive("sync", self, "timeout_s", "max_logprob_gap")
        _require(self.bucket_mb >= 0, "sync.bucket_mb must not be negative")
        _require(self.parity_every >= 0, "sync.parity_every must not be negative")
        for name in ("parity_mean", "parity_p99", "parity_max"):
            limit = getattr(self, name)
            _require(limit is None or limit > 0, f"sync.{name} must be positive (.inf switches it off)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    prompts_per_round: int = 32
    """Groups that one round trains on."""
    prompts_per_update: int | None = None
    """Groups of one optimizer step; null: all of the round (one step a round)."""
    rounds: int = 100
    """Rounds of the run; a round is one collection and one weight publication."""
    micro_batch_tokens: int = 8192
    """Tokens (padding included) of one forward/backward pass on one rank."""
    seed: int = 0
    """Seed of prompt order and sampling."""
    evaluate_every: int = 0
    """Rounds between evaluations on data.heldout; 0: only before and after."""
    heldout_n: int = 1
    """Responses a held-out prompt in an evaluation."""
    heldout_metric: str = "score"
    """What an evaluation reports the mean of: `score` (weighted, unshaped), or the name of one reward function."""
    heldout_temperature: float | None = None
    """Sampling temperature of evaluations, 0: greedy; null: rollout.temperature."""
    heldout_top_p: float | None = None
    """Nucleus sampling in evaluations; null: rollout.top_p."""
    checkpoint_every: int = 10
    """Rounds between checkpoints; 0: only the last."""
    keep_checkpoints: int = 2
    """Checkpoints kept on disk; older ones are removed."""
    collective_timeout_s: float = 3600.0
    """Deadline of a collective between ranks, in seconds; ranks wait in one while their node's engine generates."""
    start_timeout_s: float = 300.0
    """Deadline for all ranks to have read recipe and data and to have met, in seconds."""

    def __post_init__(self) -> None:
        _require(self.prompts_per_round >= 1, "train.prompts_per_round must be at least 1")
        _require(self.rounds >= 0, "train.rounds must not be negative")
        _require(self.micro_batch_tokens >= 1, "train.micro_batch_tokens must be at least 1")
        _require(
            self.prompts_per_update is None or 1 <= self.prompts_per_update <= self.prompts_per_round,
            f"train.prompts_per_update must lie between 1 and train.prompts_per_round ({self.prompts_per_round})",
        )
        _require(self.keep_checkpoints >= 1, "train.keep_checkpoints must be at least 1")
        require_from_zero("train", self, "checkpoint_every", zero="never, but at the end")
        require_from_zero("train", self, "evaluate_every", zero="never, but before and after")
        require_positive("train", self, "heldout_n", "collective_timeout_s", "start_timeout_s")
        _require(
            self.heldout_temperature is None or self.heldout_temperature >= 0, "train.heldout_temperature is negative"
        )
        _require(
            self.heldout_temperature != 0 or self.heldout_n == 1,
            "train.heldout_temperature 0 gives the same response every time: set train.heldout_n: 1",
        )
        _require(self.heldout_top_p is None or 0 < self.heldout_top_p <= 1, "train.heldout_top_p must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = "runs"
    """Folder that gets one folder a run."""
    name: str = "run"
    """Run name; the folder is <dir>/<name>-<time>."""
    rollouts_per_round: int = 64
    """Responses of each round and node written to rollouts/*.jsonl, in whole groups chosen by chance; 0: none."""

    def __post_init__(self) -> None:
        require_from_zero("run", self, "rollouts_per_round", zero="none")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    resume: str | None = None
    """auto: go on with the newest run of this run.name, or start one; or the folder of a run."""

    def __post_init__(self) -> None:
        for message in contradictions(self):
            raise RecipeError(message)

    @property
    def prompts_per_batch(self) -> int:
        """Prompts of one generation batch."""
        return self.rollout.prompts_per_batch or self.train.prompts_per_round

    @property
    def prompts_per_update(self) -> int:
        """Groups of one optimizer step."""
        return self.train.prompts_per_update or self.train.prompts_per_round
