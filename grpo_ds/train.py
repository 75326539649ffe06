"""The entry point: read the recipe, refuse what is wrong before a model loads, build the parts, run the loop.

The only file that knows every class. Heavy imports happen inside the functions, so that a wrong recipe is answered at
once.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from grpo_ds.config import Recipe
from grpo_ds.ending import StopRequested, end, end_after, end_on_signal
from grpo_ds.processes import adopt_slurm, end_with_launcher, hold_stop_request, stop_requested
from grpo_ds.recipe import read_recipe, resolve_path


def main(argv: list[str] | None = None) -> NoReturn:
    """Ends the process; exit code 0: finished, 2: wrong input, 75: stopped on request, 128 + signal: ended by it, 1: failed.

    The cause comes last on the screen.
    """
    hold_stop_request()
    end_with_launcher()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    run = Run()
    end_on_signal(run)
    try:
        adopt_slurm(os.environ)
        run.build(*read_recipe(sys.argv[1:] if argv is None else argv))
        run.train()
        run.close()
    except (Exception, KeyboardInterrupt) as error:
        end_after(run, error)
    end(run, 0, None)


class Run:
    """The parts of one run, built in the order in which mistakes are cheap to find."""

    def __init__(self) -> None:
        self.closers: list[Any] = []

    def build(self, recipe: Recipe, bases: list[Path]) -> None:
        """Everything up to the first token."""
        from grpo_ds.dist import Ranks

        self.recipe, self.bases = recipe, bases
        self.ranks = Ranks(recipe.train.collective_timeout_s, recipe.train.start_timeout_s)
        self.prompts: Any = None
        self.heldout: Any = None
        self.engine: Any = None
        self.pool: Any = None
        if self.ranks.leads_node:
            self._read_data()
        self._check_settings()
        self._connect()
        self._build_models()
        self._build_generation()
        self._build_gate()
        self._build_parts()
        self._resume_or_begin()

    def _read_data(self) -> None:
        """Data files and reward functions; no torch yet."""
        from grpo_ds.prompts import load_rows
        from grpo_ds.rewards import RewardPool

        data = self.recipe.data
        self.rows = load_rows("train", data, self.bases)
        self.heldout_rows = load_rows("heldout", data, self.bases) if data.heldout else None
        self.pool = RewardPool(self.recipe.reward, self.bases)
        self.closers.append(self.pool)
        self.pool.dry_run(self.rows.prompts, self.rows.columns)

    def _check_settings(self) -> None:
        """DeepSpeed's JSON, plugins, tokenizer, model, engine, the way to it."""
        from grpo_ds import build
        from grpo_ds.actor.ds_json import load_ds_json, reference_config
        from grpo_ds.prompts import PromptStream

        recipe = self.recipe
        self.actor_json = load_ds_json(recipe.actor.deepspeed, self.bases, "actor.deepspeed")
        self.reference_json = load_ds_json(recipe.reference.deepspeed, self.bases, "reference.deepspeed")
        reference_config(self.reference_json, dtype="float32", world=1)
        recipe = self.recipe = build.locate_plugins(recipe, self.bases)
        self.estimator, self.needs = build.build_estimator(recipe)
        self.policy_loss, self.filter = build.build_policy_loss(recipe), build.build_filter(recipe)
        build.check_heldout_metric(recipe)
        self.model_path = str(resolve_path(recipe.model.path, self.bases) or recipe.model.path)
        self.tokenizer = build.load_tokenizer(self.model_path, recipe.model)
        build.check_models(recipe, self.model_path, self.bases)
        if self.ranks.leads_node:
            build.check_engine(recipe, self.model_path)
            self.prompts = PromptStream(self.rows, self.tokenizer, recipe.data, recipe.train.seed)
            if self.heldout_rows is not None:
                plain = replace(recipe.data, shuffle=False)
                held = PromptStream(self.heldout_rows, self.tokenizer, plain, recipe.train.seed)
                self.heldout = held.take(0, len(held))
        self.transport = build.weight_transport(recipe, self.ranks)
        build.check_optimizer(recipe, self.actor_json)  # last, because it may compile

    def _connect(self) -> None:
        """Joins the other ranks, agrees on the run's folder, and starts the engine, which takes longest."""
        from grpo_ds import build
        from grpo_ds.actor import backend
        from grpo_ds.actor.checkpoint import check_state, read_state
        from grpo_ds.agreement import terms
        from grpo_ds.run_folder import find_run
        from grpo_ds.runlog import RunLog, settings_that_must_match

        self.dtype = backend.resolve_dtype(self.recipe.model)
        deepspeed = {"actor.deepspeed": self.actor_json, "reference.deepspeed": self.reference_json}
        data = self.prompts if self.ranks.nodes > 1 else None
        self.ranks.terms = terms(self.recipe, self.bases, deepspeed, data, self.heldout)
        backend.connect(self.ranks)
        found: Any = None
        if self.ranks.is_main:
            held = find_run(self.recipe)
            self.closers.append(held)
            found = [str(held.path), str(held.checkpoint or ""), self.prompts.fingerprint]
        folder, checkpoint, fingerprint = self.ranks.broadcast(found, "run folder")
        self.folder, self.checkpoint = Path(folder), Path(checkpoint) if checkpoint else None
        greedy = bool(self.needs["greedy_baseline"])
        must_match = settings_that_must_match(self.recipe, fingerprint, greedy_baseline=greedy)
        self.state = build.fresh_state(self.ranks.world, must_match)
        if self.checkpoint:
            self.state = read_state(self.checkpoint)
            check_state(self.checkpoint, self.state, must_match)
        self.log = RunLog(
            self.folder, self.recipe, is_main=self.ranks.is_main, node=self.ranks.node, first_round=self.state.round
        )
        self.closers.append(self.log)
        self.log.manifest(self.ranks.world, backend.device_kind(), self.dtype, backend.accelerators())
        self.log.say(f"run folder {self.folder}")
        if self.ranks.leads_node:
            self.log.say(self.prompts.report())
            self.log.say(f"weights reach the engine by {self.transport.kind}: {self.transport.reason}")
            self.engine = build.make_node_engine(self.recipe, self.model_path, self.dtype, self.folder, self.ranks)
            self.closers.append(self.engine)
            self.engine.start()

    def _build_models(self) -> None:
        """The actor's ZeRO-3 engine, and the reference's ZeRO-Inference engine where a KL coefficient asks for it."""
        from grpo_ds.actor import backend
        from grpo_ds.actor.ds_json import actor_config, reference_config
        from grpo_ds.actor.policy import Policy, Scorer, WithoutAdapters
        from grpo_ds.lora import add_adapters
        from grpo_ds.sync.transport import shares_devices

        recipe, world = self.recipe, self.ranks.world
        if shares_devices(recipe.engine, backend.device_kind()):
            # While it starts, vLLM counts whatever happens to the device's free memory as its own doing.
            self._await_engine()
        device = backend.device(self.ranks)
        make = partial(
            backend.build_engine, temperature=recipe.rollout.temperature, chunk=recipe.actor.logprob_chunk_tokens
        )
        config = actor_config(self.actor_json, dtype=self.dtype, grad_clip=recipe.actor.grad_clip, world=world)
        if self.state.world != world:
            # Only the universal form of a checkpoint can be read by another number of ranks.
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
        model = backend.load_model(recipe.model, self.model_path, self.dtype, config)
        add_adapters(model, recipe.model.lora, recipe.train.seed)
        if recipe.model.gradient_checkpointing:
            backend.recompute_activations(model)
        self.hf_configs: dict[str, Any] = {"config": model.config, "generation_config": model.generation_config}
        self.policy = Policy(make(model, config, actor=recipe.actor), device, recipe.actor, world)
        self.reference: Scorer | None = None
        named = recipe.reference.path
        if recipe.actor.kl_loss_coef > 0 and recipe.model.lora.rank and not named:
            self.reference = WithoutAdapters(self.policy.engine, device)
        elif recipe.actor.kl_loss_coef > 0:
            config = reference_config(self.reference_json, dtype=self.dtype, world=world)
            path = str(resolve_path(named, self.bases) or named) if named else self.model_path
            frozen = backend.load_model(recipe.model, path, self.dtype, config)
            self.reference = Scorer(make(frozen, config, actor=None), device)

    def _build_generation(self) -> None:
        """The way of the weights to the engine, and of prompts to groups with rewards."""
        from grpo_ds.collect import Collector
        from grpo_ds.evaluate import EngineSampler
        from grpo_ds.inflight import Foreground, InFlight
        from grpo_ds.sync.publish import WeightPublisher

        recipe, ranks = self.recipe, self.ranks
        self.publisher = WeightPublisher(
            self.policy.engine.module, ranks, self.engine, recipe.sync, self.transport.kind, self.policy.device.type
        )
        self.closers.append(self.publisher)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        republish = self.publisher.republish if recipe.engine.max_restarts else None
        self.sampler = EngineSampler(self.engine, recipe, decode, ranks, republish)
        self.grader = None
        if ranks.leads_node:
            self.grader = partial(self.pool.score_groups, max_response_tokens=recipe.rollout.max_response_tokens)
        kind = Foreground if recipe.sync.mode == "drain" else InFlight
        self.generation = kind(self.sampler, greedy_baseline=bool(self.needs["greedy_baseline"]))
        # Before the engine, because things are closed in reverse order and its end ends what waits for it.
        self.closers.insert(self.closers.index(self.log) + 1, self.generation)
        judges = (self.prompts, self.filter, self.generation, self.grader)
        self.collector = Collector(recipe, ranks, *judges, self.log.say)

    def _build_gate(self) -> None:
        """The proof that engine and trainer have the same policy."""
        from grpo_ds.batching import Layout
        from grpo_ds.parity import ParityGate

        self.layout: Layout = "packed" if self.recipe.model.attn_implementation.startswith("flash") else "padded"
        self.parity = ParityGate(
            self.recipe,
            dtype=self.dtype,
            ranks=self.ranks,
            prompts=self.prompts,
            sampler=self.sampler,
            policy=self.policy,
            reference=self.reference,
            publisher=self.publisher,
            settle=self.generation.settle,
            layout=self.layout,
            bos=self.tokenizer.bos_token_id,
        )

    def _build_parts(self) -> None:
        """What the loop works with."""
        from grpo_ds import build
        from grpo_ds.evaluate import EngineWatch
        from grpo_ds.loop import Parts
        from grpo_ds.losses import KlController
        from grpo_ds.metrics import reward_metrics
        from grpo_ds.objective import Objective
        from grpo_ds.rewards import function_names

        recipe, ranks = self.recipe, self.ranks
        self.kl = KlController(recipe.actor.kl_loss_coef, recipe.actor.kl_target, recipe.actor.kl_horizon)
        self.parts = Parts(
            ranks=ranks,
            collector=self.collector,
            advantage=build.advantage_stage(recipe, self.estimator, self.needs, ranks),
            objective=Objective(self.policy_loss, recipe.actor, recipe.algorithm.importance),
            actor=self.policy,
            reference=self.reference,
            kl=self.kl,
            publisher=self.publisher,
            parity=self.parity,
            log=self.log,
            layout=self.layout,
            evaluate=self._evaluate_between,
            after_round=self._after_round,
            colocation=build.colocation(recipe, ranks, self.engine, self.publisher),
            check_engine=EngineWatch(self.engine, restarts=recipe.engine.max_restarts > 0),
            counts=lambda: reward_metrics(self.pool.take_stats() if self.pool else {}, ranks) | self.sampler.faults(),
            reward_functions=tuple(function_names(recipe.reward.functions)),
        )

    def _resume_or_begin(self) -> None:
        """Restores the checkpoint, waits for the engine and publishes, so both sides agree before the first token."""
        from grpo_ds.actor.checkpoint import load_checkpoint

        if self.checkpoint:
            self.collector.carried = load_checkpoint(self.checkpoint, self.policy.engine, self.ranks)
            self.collector.again = self.state.unfinished
            self.log.say(f"resumed from {self.checkpoint}: {self.state.round} rounds done")
        self.collector.cursor = self.state.cursor
        self.policy.steps_taken = self.state.optimizer_steps
        self.totals = dict(self.state.totals)
        adapted = self.totals.pop("kl_coef", self.kl.coef)
        if self.recipe.actor.kl_target is not None:  # otherwise the coefficient is the recipe's
            self.kl.coef = adapted
        self.done, self.version = self.state.round, self.state.version
        self._await_engine()
        self.publisher.publish(self.state.version)

    def _await_engine(self) -> None:
        if self.engine:
            self.engine.wait_ready()
        self.ranks.barrier("engines ready")

    def train(self) -> None:
        """The loop, with an evaluation before it, and the finishing, which a run that was killed there repeats."""
        from grpo_ds.collect import Exhausted
        from grpo_ds.loop import train

        self.parity.measure(self.state.version)
        self.log.say(self.parity.report())
        self.parity.require()
        if "heldout_before" not in self.totals:
            self._evaluate("heldout_before", "before training")
        self.clock = time.monotonic() - self.totals["seconds"]
        try:
            self.version = train(self.recipe, self.parts, self.state.round, self.state.version)
        except Exhausted as error:
            kept = sum(self.ranks.all_gather(len(self.collector.carried), "groups that were found"))
            path = self._save()
            raise Exhausted(
                f"{error}; --resume auto goes on with the {kept} groups found so far, from {path}"
            ) from None
        self.generation.abort()
        self._finish()

    def _finish(self) -> None:
        """Checkpoint first, summary last: whenever the run is killed, the same command goes on from there."""
        from grpo_ds.actor.adapter import export_adapter
        from grpo_ds.runlog import summarise

        path = self.checkpoint if self.done == self.state.round else None
        written = {"rollouts": self.folder / "rollouts", "metrics": self.folder / "metrics.jsonl"}
        written["checkpoint"] = path or self._save()
        self._evaluate("heldout_after", f"after {self.done} rounds")
        written["model"] = self._export()
        if self.recipe.model.lora.rank:
            written["adapter"] = export_adapter(
                self.folder / "adapter", self.policy.engine.module, self.recipe.model, self.model_path, self.ranks
            )
        summary = summarise(self.totals, self.done, time.monotonic() - self.clock)
        self.log.finish(summary, {**written, "summary": self.folder / "summary.json"})
        self.ranks.part()

    def _evaluate(self, name: str, when: str) -> float | None:
        from grpo_ds.evaluate import evaluate

        self.generation.settle()  # an evaluation has the engine to itself
        score = evaluate(self.heldout, self.sampler, self.grader, self.ranks, self.recipe.train.heldout_metric)
        if score is not None:
            self.totals[name] = score
            self.log.say(f"held-out score {when}: {score:.1%}")
        return score

    def _evaluate_between(self, done: int) -> dict[str, float]:
        train = self.recipe.train
        if not train.evaluate_every or done % train.evaluate_every or done >= train.rounds:
            return {}
        score = self._evaluate(f"heldout_at_{done}", f"after {done} rounds")
        return {} if score is None else {"heldout": score}

    def _after_round(self, done: int, version: int, metrics: dict[str, Any]) -> None:
        train = self.recipe.train
        self.done, self.version = done, version
        for key in ("samples", "tokens_generated", "tokens_trained"):
            self.totals[key] += metrics[key]
        self.totals["seconds"] = time.monotonic() - self.clock
        # The signal reaches the ranks at different times, or only one.
        asked = any(self.ranks.all_gather(stop_requested(), "stop request")) and done < train.rounds
        if asked or (train.checkpoint_every and done % train.checkpoint_every == 0 and done < train.rounds):
            path = self._save()
            if asked:
                self.ranks.part()
                raise StopRequested(f"on request, after round {done}; --resume auto goes on from {path}")

    def _save(self) -> Path:
        from grpo_ds.actor.checkpoint import TrainerState, save_checkpoint

        adapted = {} if self.recipe.actor.kl_target is None else {"kl_coef": self.kl.coef}
        state = TrainerState(
            self.done,
            self.version,
            self.collector.cursor,
            self.policy.steps_taken,
            self.ranks.world,
            self.state.must_match,
            self.totals | adapted,
            self.collector.unfinished(),
        )
        carried = self.collector.carried if self.ranks.leads_node else None
        keep = self.recipe.train.keep_checkpoints
        return save_checkpoint(self.folder, self.policy.engine, state, carried, self.ranks, keep)

    def _export(self) -> Path:
        from grpo_ds.actor.export import export_model

        shards = self.publisher.shards
        return export_model(self.folder / "hf", shards, self.ranks, tokenizer=self.tokenizer, **self.hf_configs)

    def after_lost_peer(self) -> str:
        """Where a collective failed and why, for the last sentence on the screen."""
        where, lost = (self.ranks.where, self.ranks.lost_peers()) if hasattr(self, "ranks") else ("start-up", "")
        return f"{where}: a peer died or missed the deadline{lost}"

    def close(self) -> None:
        """Ends child processes; safe to call twice."""
        while self.closers:
            self.closers.pop().close()
