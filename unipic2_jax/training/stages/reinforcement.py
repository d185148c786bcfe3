"""Reinforcement of a flow model: sample groups, score them, update (paper, PDTR). How is the algorithm's, see `rl.algorithm`."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.prompts import PromptSource, make_source
from unipic2_jax.evaluation.evaluator import check_evaluation, evaluation_sources, make_evaluators
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.lora import count_matrices, scaled
from unipic2_jax.models.remat import check_policy
from unipic2_jax.optim.optimizer import make_optimizer, merge_params, split_params
from unipic2_jax.parallel.mesh import batch_shards, described_rows, described_whole, replicated, shard_batch
from unipic2_jax.parallel.processes import local_rows
from unipic2_jax.parallel.rules import described, gathered
from unipic2_jax.rewards.scoring import check_tasks, make_entries
from unipic2_jax.rl.algorithm import ALGORITHMS, Algorithm, algorithm_fields, make_algorithm
from unipic2_jax.rl.feedback import Feedback, count_failures, no_failures
from unipic2_jax.rl.policy import PolicyNetwork
from unipic2_jax.rl.sampler import Prepared, Sampler, agreed_records
from unipic2_jax.training.compiling import BackgroundCompiler
from unipic2_jax.training.low_rank import check_lora, export_lora, lora_fields, merged, new_lora, scale_of
from unipic2_jax.training.stage import NO_STEP, STAGES, Program, Stage, StageContext, stage_fields

# What an update draws has this number among what a step's key gives; the sampler's are the first ones.
UPDATE_KEY = 2**31


class StageState(NamedTuple):
    """All that changes during a stage."""

    policy: Any  # the algorithm's `State`
    failures: jax.Array  # see `rl.feedback.count_failures`


def _whole_groups(mesh: jax.sharding.Mesh, samples: int, group_size: int) -> bool:
    """Whether every process holds all samples of the groups that it holds any of."""
    held = [local_rows(mesh, samples, process) // group_size for process in range(jax.process_count())]
    return all(len(set(groups)) * group_size == len(groups) for groups in held)


def tell_micro_batch(name: str, config: ConfigDict, devices: int, log: Callable[[str], None]) -> None:
    """Says so where `make_algorithm` makes a stage's micro-batch larger, which changes how an update is computed and not what it is."""
    if 0 < (asked := algorithm_fields(config).micro_batch) < devices:
        log(f"{name}: micro_batch is {devices} instead of {asked}, a sample for each device.")


def _check_batches(config: ConfigDict, algorithm: Algorithm, devices: int) -> None:
    """Raises a ConfigError when the samples of a step cannot be shared as the fields say."""
    layout, rl, group = algorithm.layout, algorithm.config, config.kind
    part, micro_batch = layout.samples // rl.updates_per_rollout, algorithm.micro_batch
    if layout.samples % rl.updates_per_rollout or part % micro_batch or micro_batch % devices:
        raise ConfigError(
            f"num_prompts * group_size = {layout.samples} samples cannot be split into {rl.updates_per_rollout} updates "
            f"of micro-batches of {micro_batch} on {devices} devices; choose num_prompts, "
            f"{group}.updates_per_rollout and {group}.micro_batch that divide, and leave each device a sample."
        )
    if layout.batches < 1 or config.num_prompts % layout.batches:
        raise ConfigError(
            f"num_prompts = {config.num_prompts} cannot be sampled in {layout.batches} batches; choose a divisor."
        )
    if layout.samples_at_once % devices:
        raise ConfigError(
            f"A sampling batch of {layout.samples_at_once} samples cannot be split over {devices} devices; "
            "choose fewer sampling_batches."
        )


def _check_fields(config: ConfigDict, algorithm: Algorithm) -> None:
    """Raises a ConfigError for a field of the stage that is out of range or contradicts another."""
    if not 0 <= config.error_budget <= 1 or config.error_window < 1:
        raise ConfigError(
            f"error_budget is {config.error_budget} over {config.error_window} steps; use a share of 0 to 1 and at "
            "least one step."
        )
    for field, known in {"reference": ("stage_start", "base"), "reference_mode": ("sample", "mode")}.items():
        if config[field] not in known:
            raise ConfigError(f"{field} is '{config[field]}'; use one of {', '.join(known)}.")
    if config.negative_prompt is not None and algorithm.config.guidance_scale == 1:
        raise ConfigError(
            f"negative_prompt changes nothing at {config.kind}.guidance_scale 1, which is no guidance; raise it, or leave "
            "negative_prompt out."
        )
    if not algorithm.config.weights:
        raise ConfigError("there is no reward with a weight; name one in `rewards`.")
    check_policy(config.remat)
    check_lora(config.lora)
    if config.reference == "base" and (not config.lora.rank or config.lora.init):
        raise ConfigError(
            "reference='base' continues the LoRA of the stage before; give lora.rank its rank and leave lora.init empty."
        )


def _check_rewards(config: ConfigDict, algorithm: Algorithm, mesh: jax.sharding.Mesh) -> None:
    """Raises a ConfigError for rewards that cannot be made, or cannot score the stage's prompts."""
    entries, layout = make_entries(config.rewards, mesh), algorithm.layout
    check_tasks(entries, make_source(config.source, 0))
    whole = [name for name, entry in entries.items() if entry.reward.groupwise]
    if whole and jax.process_count() > 1 and not _whole_groups(mesh, layout.samples_at_once, layout.group_size):
        raise ConfigError(
            f"The reward '{whole[0]}' compares the samples of a group, and on this mesh the devices of a process hold parts "
            f"of groups; make num_prompts / sampling_batches a multiple of {batch_shards(mesh)}."
        )


class ReinforcementStage(Stage):
    """A stage whose kind is the name of an algorithm, which has its hyper-parameters in the group of fields of that name.

    `reference='stage_start'` measures the KL from the weights that the stage begins with, into which the stage before
    has merged its LoRA. `reference='base'` continues the LoRA of the reinforcement before without merging it, so that the
    KL is measured from the weights that stage was measured from. What a schedule ends with is always merged.
    """

    kind: ClassVar[str]

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The paper's hyper-parameters, and where an algorithm is not the paper's, those of its authors."""
        config, algorithm = stage_fields(), ALGORITHMS[cls.kind]
        config.kind = cls.kind
        config.source = {}  # of training prompts; see data.prompts.make_source
        config.rewards = {}  # name -> fields; see rewards.scoring.make_entries. With weight 0 a reward is only watched
        config.evaluations = {}  # name -> fields of evaluator.evaluation_fields
        config.num_prompts = 16  # per step; with groups of 16 that is the paper's batch of 256
        config.height = 512
        config.width = 512
        config.negative_prompt = config_dict.placeholder(str)  # of guidance; None: the model's own for each task
        config.reference = "stage_start"  # stage_start | base
        config.reference_mode = "sample"  # of the source image's latents: sample | mode
        config.same_latent = False  # a group starts from one noise: rewards then differ by the stochastic steps alone
        config.use_ema = True  # evaluate and keep the moving average rather than the last LoRA
        # Both branches of guidance in one call: faster to compile, and weights are read once for both.
        config.batch_branches = False
        # See models.remat; or auto: the plan chooses, and then `micro_batch` 0 is as many samples as fit (`perf.split`).
        config.remat = "full"
        # Parts in which a step's prompts are sampled; one is scored while the next is sampled. None: see rl.algorithm.sampling_batches.
        config.sampling_batches = config_dict.placeholder(int)
        config.audit_every = 0  # steps; pictures and raw scores of these go into audit/. 0: of none
        # When more than this share of the last `error_window` steps' samples could not be scored, the run saves and stops.
        config.error_budget = 0.5
        config.error_window = 10
        config.lora = lora_fields(32)
        config[cls.kind] = ConfigDict(algorithm.fields())
        config.optimizer.update({"name": "adam", "lr": 3e-4, "betas": (0.9, 0.999), "weight_decay": 0.0})
        del config.optimizer["trainable"]  # the LoRA is what is trained, or all of the transformer
        config.update(algorithm.stage_defaults)
        return config

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Builds everything that the configuration describes and that costs nothing."""
        devices = batch_shards(mesh)
        algorithm = make_algorithm(config, devices)
        _check_batches(config, algorithm, devices)
        _check_fields(config, algorithm)
        make_optimizer(config.optimizer, config.steps * algorithm.config.updates_per_rollout)
        _check_rewards(config, algorithm, mesh)
        for name, fields in config.evaluations.items():
            check_evaluation(name, fields)

    @classmethod
    def prompt_sources(cls, config: ConfigDict) -> list[PromptSource]:
        return [make_source(config.source, 0), *evaluation_sources(config.evaluations)]

    @classmethod
    def continues_lora(cls, config: ConfigDict) -> bool:
        return config.reference == "base"

    def __init__(self, config: ConfigDict, bundle: Bundle, context: StageContext):
        held = {n: tree if n == "lora" else context.precision.hold(tree) for n, tree in bundle.params.items()}
        transformer = bundle.transformer.clone(remat=config.remat)
        super().__init__(config, dataclasses.replace(bundle, params=held, transformer=transformer), context)
        mesh, say = context.mesh, lambda sentence: context.log(f"{context.name}: {sentence}")
        self.algorithm = make_algorithm(config, batch_shards(mesh))
        tell_micro_batch(context.name, config, batch_shards(mesh), context.log)
        self.scale = scale_of(config.lora) if config.lora.rank else None  # of the LoRA; None: there is none
        self.network = PolicyNetwork(transformer, self.scale, bundle.scheduler.num_train_timesteps)
        # The LoRA under which the KL is measured; None: the bare weights.
        self.reference_lora = self.place(self._new_trained(self.params["transformer"])) if config.lora.init else None
        self.source = make_source(config.source, context.data_seed())
        self.optimizer = make_optimizer(config.optimizer, config.steps * self.algorithm.config.updates_per_rollout)
        self.gathers_first = context.gather == "update"
        prepare = {"prepare": gathered} if self.gathers_first else {}
        self.sampler = Sampler(
            self.algorithm,
            self.bundle,
            self.network,
            mesh,
            height=config.height,
            width=config.width,
            negative_prompt=config.negative_prompt,
            reference_mode=config.reference_mode,
            **prepare,
        )
        self.feedback = Feedback(
            make_entries(config.rewards, mesh, context.precision),
            self.algorithm.config,
            self.algorithm.layout,
            mesh,
            audit=(context.workdir / "audit" / context.name, config.audit_every),
            tell=lambda sentence: context.log(f"{context.name}, {sentence}"),
            span=context.timeline.span,
        )
        self._update = self.algorithm.make_update(self.network, self.optimizer, donate_argnames="state", **prepare)
        self._update_key = jax.jit(lambda key: jax.random.fold_in(key, UPDATE_KEY), out_shardings=replicated(mesh))
        self._remarked = False
        self.compiler = BackgroundCompiler(mesh, say)
        self.evaluators = make_evaluators(config.evaluations, self.bundle, *context.evaluates)

    @property
    def params(self) -> dict[str, Any]:
        return self.bundle.params

    def init(self) -> StageState:
        """What is trained: a LoRA as `training.low_rank.new_lora` has it, or the one of the stage before under `reference='base'`, or
        all of the transformer."""
        kept = self.params.get("lora") if self.config.reference == "base" else None
        new = self._new_trained(self.params["transformer"])
        if kept is not None and jax.tree.map(np.shape, kept) != jax.tree.map(np.shape, new):
            raise ConfigError(
                f"Stage '{self.context.name}' continues a LoRA of rank {jax.tree.leaves(kept)[0].shape[-1]} on "
                f"{count_matrices(kept)} matrices, and its own has rank {self.config.lora.rank} on {count_matrices(new)}; make lora equal."
            )
        policy = self.place(self.algorithm.init(new if kept is None else kept, self.optimizer))
        return StageState(policy, self._whole(no_failures(self.config.error_window)))

    def _new_trained(self, params: Any) -> Any:
        config = self.config.lora
        if self.scale is None:
            return self.context.precision.lift(split_params(params, ".*", self.bundle.backbone.never_trained)[0])
        return new_lora(config, self.context.key(NO_STEP), params, self.bundle.transformer.config)

    def _whole(self, values: np.ndarray) -> jax.Array:
        return jax.device_put(values, replicated(self.context.mesh))

    def saved_as(self, state: StageState, names: Iterable[str]) -> Any:
        """Before the window of failures was in it, the state was the policy's alone."""
        return state if "failures" in names else state.policy

    def restored(self, state: Any) -> StageState:
        if isinstance(state, StageState):
            return state
        return StageState(state, self._whole(no_failures(self.config.error_window)))

    def step(self, state: StageState, step: int) -> tuple[StageState, dict[str, float]]:
        """Rollouts, rewards, updates."""
        started = time.perf_counter()
        records = agreed_records(self.source.batch(step, self.config.num_prompts), self.context.mesh)
        key, layout, over = self.context.key(step), self.algorithm.layout, threading.Event()
        sampled, scoring = [], []
        span = self.context.timeline.span
        parts = [records[start:][: layout.prompts_at_once] for start in range(0, len(records), layout.prompts_at_once)]
        with span("read 0"):
            read = self.sampler.read(parts[0])
        for part, own in enumerate(parts):
            with span(f"begin {part}"):
                prepared = self.sampler.prepare(self.params, read, key, part)
                self._compile_update(state.policy, prepared, edits=own[0].image is not None)
                rollout, drawn = self.sampler.sample(self.params, self.algorithm.behaviour(state.policy), prepared)
            if part + 1 < len(parts):  # while the devices sample
                with span(f"read {part + 1}"):
                    read = self.sampler.read(parts[part + 1])
            with span(f"sample {part}"):
                jax.block_until_ready(rollout)
            with span(f"decode {part}"):
                images = self.sampler.collect(drawn)
            sampled.append((rollout, prepared.inputs))
            scoring.append(self.feedback.start(images, own, step, part, over))
        rollout, inputs = self.sampler.together(sampled)
        del sampled, prepared, read, drawn
        rolled_out = time.perf_counter()

        with span("wait for scores"):
            advantages, metrics = self.feedback.advantages([result() for result in scoring], records)
        failures = self._count_failures(state, metrics["failed"], step)
        scored = time.perf_counter()

        policy, first_step = state.policy, self.algorithm.first_step(rollout)
        if metrics["failed"] < layout.samples:
            advantages = shard_batch(advantages, self.context.mesh)
            with span("compile"):
                program = self.compiler[records[0].image is not None]
            with span("update"):
                arguments = self._update_arguments(policy, rollout, advantages, inputs, self._update_key(key))
                policy, update = program(*arguments)
                metrics |= {name: float(value) for name, value in jax.device_get(update).items()}
            self._remark(metrics, step)
        updated = time.perf_counter()
        busy = rolled_out - started + updated - scored
        sampling, training = self._flops("references" in inputs["cond"], first_step)
        metrics |= {
            "seconds_rollout": rolled_out - started,
            "seconds_reward": scored - rolled_out,  # what of it was waited for
            "seconds_update": updated - scored,
            "samples_per_second": layout.samples / (updated - started),
            "model_tflops_per_second": (sampling + training * metrics.get("computed", 1.0)) / busy / 1e12,
        }
        return StageState(policy, failures), metrics

    def _update_arguments(self, policy: Any, rollout: Any, advantages: Any, inputs: Any, key: Any) -> tuple[Any, ...]:
        return self.params["transformer"], policy, self.reference_lora, rollout, advantages, inputs, key

    def _described_update(self, policy: Any, prepared: Prepared) -> tuple[Any, ...]:
        """Arguments of the update that follows rollouts from what was prepared; what those give is described."""
        rolled = self.sampler.arguments(self.params, self.algorithm.behaviour(policy), prepared)
        rollout, inputs = self.sampler.described_sample(rolled, prepared.inputs)
        advantages = described_rows(np.zeros(1, np.float32), self.algorithm.layout.samples, self.context.mesh)
        key = described_whole(jax.eval_shape(self._update_key, prepared.key), self.context.mesh)
        return self._update_arguments(policy, rollout, advantages, inputs, key)

    def _compile_update(self, policy: Any, prepared: Prepared, edits: bool) -> None:
        """Begins to compile the update of a task, while the first rollout is compiled."""
        if edits not in self.compiler:
            self.compiler.ask(edits, "the update", self._update, *self._described_update(policy, prepared))

    def _count_failures(self, state: StageState, failed: float, step: int) -> jax.Array:
        """The state's window after this step; raises a `TrainingPaused` when too much of it could not be scored."""
        failures = count_failures(
            np.asarray(jax.device_get(state.failures)),
            int(failed),
            self.algorithm.layout.samples,
            self.config.error_budget,
            step,
            self.context.name,
            ", ".join(self.feedback.scorer.entries),
        )
        return self._whole(failures)

    def _remark(self, metrics: Mapping[str, float], step: int) -> None:
        if not self._remarked and (sentence := self.algorithm.remark(metrics)):
            self._remarked = True
            self.context.log(f"{self.context.name}, step {step}: {sentence}")

    def _flops(self, edits: bool, first_step: int | None = None) -> tuple[int, int]:
        """FLOPs of the transformer in a step's rollouts and in its update."""
        config, bundle = self.bundle.transformer.config, self.bundle
        pixels = bundle.vae.config.downsampling * config.patch_size
        tokens = (self.config.height // pixels) * (self.config.width // pixels)
        forward = bundle.backbone.flops(config, tokens, bundle.conditioner.context_length, tokens if edits else 0)
        return self.algorithm.passes(first_step).flops(forward, trains_weights=self.scale is None)

    def programs(self) -> list[Program]:
        params, sampler, algorithm = self.params, self.sampler, self.algorithm
        key = jax.eval_shape(lambda: self.context.key(0))
        encode, prepared = sampler.described(params, self.source.batch(0, 1)[0], key)
        trained = jax.eval_shape(self._new_trained, params["transformer"])
        policy = jax.eval_shape(lambda tree: algorithm.init(tree, self.optimizer), trained)
        policy = described(self.context.mesh, policy)
        transformer, behaviour, *begins = sampler.arguments(params, algorithm.behaviour(policy), prepared)
        rollout = sampler.rollout.eval_shape(transformer, behaviour, *begins)
        update = self._described_update(policy, prepared)
        sampling, training = self._flops("references" in prepared.inputs["cond"])
        summed = algorithm.layout.samples // algorithm.micro_batch * algorithm.config.trained_steps
        frozen = ("gathered" if self.gathers_first else "parameters", transformer)
        of_step = lambda values: [("batch", value) for value in values]
        times = algorithm.layout.batches
        # What is after the state: the reference, which is no part of the model, is counted with the batch.
        updated = [frozen, ("state", policy), *of_step(update[2:])]
        return [
            Program.of("encode", sampler.encode, [("parameters", params), *of_step(encode[1:])], calls=times),
            Program.of(
                "rollout",
                sampler.rollout,
                [frozen, ("parameters", behaviour), *of_step(begins)],
                model_flops=sampling / times,
                calls=times,
            ),
            Program.of("decode", sampler.decode, [("parameters", params["vae"]), ("batch", rollout)], calls=times),
            Program.of("update", self._update, updated, model_flops=training, gradients=summed),
        ]

    def _kept(self, state: StageState) -> Any:
        return state.policy.ema if self.config.use_ema else state.policy.lora

    def evaluate(self, state: StageState, step: int) -> dict[str, Any]:
        """All evaluations with the LoRA that the stage would keep."""
        del step
        result: dict[str, Any] = {"metrics": {}, "scores": {}, "images": {}}
        params, lora = self.network.weights(self.params["transformer"], self._kept(state))
        for evaluator in self.evaluators:
            for part, values in evaluator.run({**self.params, "transformer": params}, lora).items():
                result[part] |= values
        return result

    def close(self) -> None:
        self.compiler.close()

    def finish(self, state: StageState) -> Any:
        """Merges the LoRA, unless the next stage continues it."""
        kept, following = self._kept(state), self.context.next_lora
        params = {name: tree for name, tree in self.params.items() if name != "lora"}
        before = params["transformer"]
        if self.scale is None:
            return dataclasses.replace(self.bundle, params={**params, "transformer": merge_params(kept, before)})
        if following is not None:
            if (scale := scale_of(following)) != self.scale:
                kept = scaled(kept, self.scale / scale)
            return dataclasses.replace(self.bundle, params={**params, "lora": kept})
        transformer = merged(before, kept, self.scale, self.context.precision.trained)
        return dataclasses.replace(self.bundle, params={**params, "transformer": transformer})

    def export(self, state: StageState, folder: Path) -> None:
        """The LoRA in the file that diffusers' `load_lora_weights` reads."""
        if self.scale is not None:
            export_lora(folder, self._kept(state), self.config.lora.alpha, self.bundle.transformer.config)


@functools.cache
def stage_of(kind: str) -> type[ReinforcementStage]:
    """The class of stages with the algorithm of this name."""
    return type(f"{kind.upper()}Stage", (ReinforcementStage,), {"kind": kind})


STAGES.adopt(ALGORITHMS, stage_of)
