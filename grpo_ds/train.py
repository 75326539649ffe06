"""The entry point: read the recipe, refuse what is wrong before a model loads, build the parts, run the loop.

The only file that knows every class. Heavy imports happen inside the functions, so that a wrong recipe is answered at
once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grpo_ds.config import Recipe, RecipeError
from grpo_ds.processes import (
    STOPPED,
    adopt_slurm,
    end_with_launcher,
    hold_stop_request,
    is_peer_failure,
    say_last,
    stop_requested,
)
from grpo_ds.recipe import read_recipe, resolve_path


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: finished, 2: wrong input, 75: stopped on request, 130: interrupted, 1: failed; the cause comes last."""
    hold_stop_request()
    end_with_launcher()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    run = Run()
    try:
        adopt_slurm(os.environ)
        run.build(*read_recipe(sys.argv[1:] if argv is None else argv))
        run.train()
        run.close()
    except StopRequested as request:
        _stop(run, STOPPED, str(request) if _rank() == 0 else None)
    except KeyboardInterrupt:
        _stop(run, 130, "interrupted")
    except RecipeError as error:
        # All ranks read the same recipe, so the first one speaks for them.
        _stop(run, 2, str(error), peer=_rank() != 0)
    except Exception as error:
        peer = is_peer_failure(error) or (type(error).__name__ in ("SyncError", "ParityError") and _rank() != 0)
        if not peer:
            traceback.print_exc()
        _stop(run, 1, _sentence(run, error, peer), peer=peer)
    return 0


def _sentence(run: Run, error: Exception, peer: bool) -> str:
    """The cause of the end in one line."""
    # A server's log, after a line of dashes, stands in the traceback.
    cause = f"{type(error).__name__}: {' '.join(str(error).partition(chr(10) + '--- ')[0].split())}"
    if peer and type(error) is RuntimeError:  # of a collective inside DeepSpeed
        where, lost = (run.ranks.where, run.ranks.lost_peers()) if hasattr(run, "ranks") else ("start-up", "")
        return f"a collective of DeepSpeed failed at {where}: a peer died or missed the deadline{lost}: {cause[:300]}"
    return cause


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


class StopRequested(Exception):
    """The run was asked to stop and has written a checkpoint; not an error."""


def _stop(run: Run, code: int, cause: str | None, *, peer: bool = False) -> None:
    """Ends the process; a cause of None is left to another rank to say."""
    try:
        if cause is not None:
            say_last(f"rank {_rank()}: {cause}" if _rank() else cause, peer=peer)
        run.close()
    except Exception:  # the run ends in any case, and both reasons are shown
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Collectives may be pending, and interpreter shutdown would wait for them.
        os._exit(code)


class Run:
    """The parts of one run, built in the order in which mistakes are cheap to find."""

    def __init__(self) -> None:
        self.closers: list[Any] = []

    def build(self, recipe: Recipe, bases: list[Path]) -> None:
        """Everything up to the first token."""
        from grpo_ds.dist import Ranks

        self.recipe, self.bases = recipe, bases
        self.ranks = Ranks(recipe.train.collective_timeout_s)
        self.prompts: Any = None
        self.heldout: Any = None
        self.engine: Any = None
        self.pool: Any = None
        if self.ranks.leads_node:
            self._read_data()
        self._check_settings()
        self._connect()
        self._build_models()
        self._build_parts()
        self._resume_or_begin()

    def _read_data(self) -> None:
        """Data files and reward functions; no torch yet."""
        from grpo_ds.prompts import load_rows
        from grpo_ds.rewards import RewardPool

        data = self.recipe.data
        self.rows = load_rows(data.train, data, self.bases, "data.train")
        self.heldout_rows = load_rows(data.heldout, data, self.bases, "data.heldout") if data.heldout else None
        self.pool = RewardPool(self.recipe.reward, self.bases)
        self.closers.append(self.pool)
        self.pool.dry_run(self.rows.prompts, self.rows.columns)

    def _check_settings(self) -> None:
        """DeepSpeed's JSON, plugins, tokenizer, engine, the way to it."""
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
        self.model_path = str(resolve_path(recipe.model.path, self.bases) or recipe.model.path)
        self.tokenizer = build.load_tokenizer(self.model_path, recipe.model)
        build.check_lora(self.model_path, recipe.model)
        if self.ranks.leads_node:
            build.check_engine(recipe, self.model_path)
            self.prompts = PromptStream(self.rows, self.tokenizer, recipe.data, recipe.train.seed)
            if self.heldout_rows is not None:
                plain = replace(recipe.data, shuffle=False)
                held = PromptStream(self.heldout_rows, self.tokenizer, plain, recipe.train.seed)
                self.heldout = held.take(0, len(held))
        self.transport = build.weight_transport(recipe, self.ranks)

    def _connect(self) -> None:
        """Joins the other ranks, agrees on the run's folder, and starts the engine, which takes longest."""
        from grpo_ds import build
        from grpo_ds.actor import backend
        from grpo_ds.actor.checkpoint import check_state, read_state
        from grpo_ds.runlog import RunLog, settings_that_must_match

        self.dtype = backend.resolve_dtype(self.recipe.model)
        backend.connect(self.ranks)
        found: Any = None
        if self.ranks.is_main:
            folder, checkpoint = build.find_run(self.recipe)
            found = [str(folder), str(checkpoint or ""), self.prompts.fingerprint]
        folder, checkpoint, fingerprint = self.ranks.broadcast(found, "run folder")
        self.folder, self.checkpoint = Path(folder), Path(checkpoint) if checkpoint else None
        must_match = settings_that_must_match(self.recipe, fingerprint)
        self.state = build.fresh_state(self.ranks.world, must_match)
        if self.checkpoint:
            self.state = read_state(self.checkpoint)
            check_state(self.checkpoint, self.state, must_match)
        self.log = RunLog(
            self.folder, self.recipe, is_main=self.ranks.is_main, node=self.ranks.node, first_round=self.state.round
        )
        self.closers.append(self.log)
        self.log.manifest(self.ranks.world, backend.device_kind(), self.dtype)
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

        recipe, world = self.recipe, self.ranks.world
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
        self.hf_config = model.config
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

    def _build_parts(self) -> None:
        from grpo_ds import build
        from grpo_ds.actor import backend
        from grpo_ds.collect import Collector
        from grpo_ds.colocation import Colocation
        from grpo_ds.evaluate import EngineSampler
        from grpo_ds.inflight import Foreground, InFlight
        from grpo_ds.loop import Parts
        from grpo_ds.losses import KlController
        from grpo_ds.objective import Objective
        from grpo_ds.parity import ParityGate
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
        greedy = bool(self.needs["greedy_baseline"])
        self.generation = (Foreground if recipe.sync.mode == "drain" else InFlight)(
            self.sampler, greedy_baseline=greedy
        )
        # Before the engine, because things are closed in reverse order and its end ends what waits for it.
        self.closers.insert(self.closers.index(self.log) + 1, self.generation)
        self.collector = Collector(recipe, ranks, self.prompts, self.filter, self.generation, self.grader)
        layout: Any = "packed" if recipe.model.attn_implementation.startswith("flash") else "padded"
        self.parity = ParityGate(
            recipe,
            dtype=self.dtype,
            ranks=ranks,
            prompts=self.prompts,
            sampler=self.sampler,
            policy=self.policy,
            reference=self.reference,
            publisher=self.publisher,
            settle=self.generation.settle,
            layout=layout,
            bos=self.tokenizer.bos_token_id,
        )
        on_device = backend.device_kind() != "cpu"
        self.kl = KlController(recipe.actor.kl_loss_coef, recipe.actor.kl_target, recipe.actor.kl_horizon)
        self.parts = Parts(
            ranks=ranks,
            collector=self.collector,
            advantage=build.build_advantage_stage(recipe, self.estimator, self.needs, ranks),
            objective=Objective(self.policy_loss, recipe.actor, recipe.algorithm.importance),
            actor=self.policy,
            reference=self.reference,
            kl=self.kl,
            publisher=self.publisher,
            parity=self.parity,
            log=self.log,
            layout=layout,
            after_round=self._after_round,
            colocation=Colocation(recipe.engine, ranks, self.engine, backend.free_device_memory if on_device else None),
            engine_faults=self.sampler.faults,
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
        self.kl.coef = self.totals.setdefault("kl_coef", self.kl.coef)
        if self.engine:
            self.engine.wait_ready()
        self.ranks.barrier("engines ready")
        self.publisher.publish(self.state.version)

    def train(self) -> None:
        """The loop, with an evaluation before and after, and everything written at the end."""
        from grpo_ds.actor.adapter import export_adapter
        from grpo_ds.loop import train

        recipe = self.recipe
        self.parity.measure(self.state.version)
        self.log.say(self.parity.report())
        self.parity.require()
        if "heldout_before" not in self.totals:
            self._evaluate("heldout_before", "before training")
        self.clock = time.monotonic() - self.totals["seconds"]
        version = train(recipe, self.parts, self.state.round, self.state.version)
        self.generation.abort()
        self._evaluate("heldout_after", f"after {recipe.train.rounds} rounds")
        written = {"rollouts": self.folder / "rollouts", "metrics": self.folder / "metrics.jsonl"}
        written["checkpoint"] = self._save(recipe.train.rounds, version)
        written["model"] = self._export()
        if recipe.model.lora.rank:
            written["adapter"] = export_adapter(
                self.folder / "adapter", self.policy.engine.module, recipe.model, self.model_path, self.ranks
            )
        whole = {k: int(self.totals[k]) for k in ("samples", "tokens_generated", "tokens_trained")}
        summary = {
            "heldout_before": self.totals.get("heldout_before"),
            "heldout_after": self.totals.get("heldout_after"),
            "seconds": round(time.monotonic() - self.clock, 2),
            "rounds": recipe.train.rounds,
            **whole,
        }
        self.log.finish(summary, {**written, "summary": self.folder / "summary.json"})

    def _evaluate(self, name: str, when: str) -> None:
        from grpo_ds.evaluate import evaluate

        self.generation.settle()  # an evaluation has the engine to itself
        score = evaluate(self.heldout, self.sampler, self.grader, self.ranks)
        if score is not None:
            self.totals[name] = score
            self.log.say(f"held-out score {when}: {score:.1%}")

    def _after_round(self, done: int, version: int, metrics: dict[str, Any]) -> None:
        train = self.recipe.train
        for key in ("samples", "tokens_generated", "tokens_trained"):
            self.totals[key] += metrics[key]
        self.totals["kl_coef"] = self.kl.coef
        self.totals["seconds"] = time.monotonic() - self.clock
        if train.evaluate_every and done % train.evaluate_every == 0 and done < train.rounds:
            self._evaluate(f"heldout_at_{done}", f"after {done} rounds")
        asked = self._stop_agreed() and done < train.rounds
        if asked or (train.checkpoint_every and done % train.checkpoint_every == 0 and done < train.rounds):
            path = self._save(done, version)
            if asked:
                raise StopRequested(f"on request, after round {done}; --resume auto goes on from {path}")

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop: the signal reaches them at different times, or only one."""
        import torch

        mine = torch.tensor([float(stop_requested())])
        return bool(self.ranks.max(mine, "stop request"))

    def _save(self, done: int, version: int) -> Path:
        from grpo_ds.actor.checkpoint import TrainerState, save_checkpoint

        state = TrainerState(
            done,
            version,
            self.collector.cursor,
            self.policy.steps_taken,
            self.ranks.world,
            self.state.must_match,
            dict(self.totals),
            self.collector.unfinished(),
        )
        carried = self.collector.carried if self.ranks.leads_node else None
        keep = self.recipe.train.keep_checkpoints
        return save_checkpoint(self.folder, self.policy.engine, state, carried, self.ranks, keep)

    def _export(self) -> Path:
        from grpo_ds.actor.export import export_model

        return export_model(self.folder / "hf", self.publisher.shards, self.hf_config, self.tokenizer, self.ranks)

    def close(self) -> None:
        """Ends child processes; safe to call twice."""
        while self.closers:
            self.closers.pop().close()
