"""Reinforcement of a flow model with GRPO: sample groups, score them, move the LoRA (paper, PDTR; Flow-GRPO)."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict, config_dict

from unipic2_jax.core.errors import ConfigError, TrainingPaused
from unipic2_jax.data.prompts import UNREAD, PromptRecord, PromptSource, make_source, source_pictures, stack_sources
from unipic2_jax.evaluation.evaluator import check_evaluation, evaluation_sources, make_evaluators
from unipic2_jax.flow.sde import SDEConfig
from unipic2_jax.models import sampling
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.conditioner import tokenize_negative
from unipic2_jax.models.lora import count_matrices, scaled
from unipic2_jax.models.remat import check_policy
from unipic2_jax.optim.optimizer import make_optimizer, merge_params, split_params
from unipic2_jax.parallel.mesh import (
    batch_sharding,
    batch_shards,
    described_rows,
    described_whole,
    replicated,
    shard_batch,
)
from unipic2_jax.parallel.processes import gather_json, gather_rows, local_rows, row_owners, rows_to_host
from unipic2_jax.parallel.rules import RULES, described, gathered
from unipic2_jax.pictures import resize as pictures
from unipic2_jax.pictures.resize import to_uint8
from unipic2_jax.rewards.audit import write_audit
from unipic2_jax.rewards.combine import combine_rewards, normalize
from unipic2_jax.rewards.scoring import Scored, Scorer, check_tasks, make_entries
from unipic2_jax.rl.advantages import group_advantages
from unipic2_jax.rl.config import GRPOConfig
from unipic2_jax.rl.rollout import Trajectory, guided_policies, once_per_group
from unipic2_jax.rl.update import PolicyState, grpo_step_flops, init_state, make_rollout, make_update
from unipic2_jax.training.compiling import BackgroundCompiler
from unipic2_jax.training.low_rank import check_lora, export_lora, lora_fields, merged, new_lora, scale_of
from unipic2_jax.training.stage import NO_STEP, STAGES, Program, Stage, StageContext, stage_fields


def grpo_fields() -> ConfigDict:
    """`rl.config.GRPOConfig` as fields of a configuration; a window is written as three numbers."""
    fields = dataclasses.asdict(GRPOConfig())
    del fields["weights"]  # they come from the stage's rewards
    fields["window"] = {"size": 0, "low": 0, "high": 0}  # size 0: every step is stochastic
    # Samples of an update that are computed at once, at least one for each device; 0: all.
    fields["micro_batch"] = 0
    return ConfigDict(fields)


def _join(sampled: list[tuple[Trajectory, Any]]) -> tuple[Trajectory, Any]:
    """Batches that were sampled under the same window as one, with its conditioning."""
    trajectories, inputs = zip(*sampled)
    first, along = trajectories[0], lambda axis: lambda *leaves: jnp.concatenate(leaves, axis)
    together = {field: getattr(first, field) for field in Trajectory._fields}
    for field in ("latents", "log_probs", "means"):
        if together[field] is not None:
            together[field] = along(1)(*(getattr(trajectory, field) for trajectory in trajectories))
    return Trajectory(**together), jax.tree.map(along(0), *inputs)


def _whole_groups(mesh: jax.sharding.Mesh, samples: int, group_size: int) -> bool:
    """Whether every process holds all samples of the groups that it holds any of."""
    held = [local_rows(mesh, samples, process) // group_size for process in range(jax.process_count())]
    return all(len(set(groups)) * group_size == len(groups) for groups in held)


def read_grpo(config: ConfigDict, devices: int = 1) -> GRPOConfig:
    """The hyper-parameters of a stage as `rl` wants them, for so many devices."""
    fields = config.grpo.to_dict()
    window = fields["window"]
    fields["window"] = (window["size"], (window["low"], window["high"])) if window["size"] else None
    fields["micro_batch"] = max(fields["micro_batch"], devices) if fields["micro_batch"] else None
    fields["sde"] = SDEConfig(**fields["sde"])
    weights = tuple((name, float(options.get("weight", 1.0))) for name, options in config.rewards.items())
    return GRPOConfig(**fields, weights=tuple((name, weight) for name, weight in weights if weight))


def tell_micro_batch(name: str, config: ConfigDict, devices: int, log: Callable[[str], None]) -> None:
    """Says so where `read_grpo` makes a stage's micro-batch larger, which changes how an update is computed and not what it is."""
    if 0 < (asked := config.grpo.micro_batch) < devices:
        log(f"{name}: micro_batch is {devices} instead of {asked}, a sample for each device.")


@STAGES.register("grpo")
class GRPOStage(Stage):
    """One GRPO stage. The state is `rl.update.PolicyState`: LoRA, optimizer, moving average, number of updates.

    `reference='stage_start'` measures the KL from the weights that the stage begins with, into which the stage before
    has merged its LoRA. `reference='base'` continues the LoRA of the GRPO stage before without merging it, so that the
    KL is measured from the weights that stage was measured from. What a schedule ends with is always merged.
    """

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The paper's hyper-parameters."""
        config = stage_fields()
        config.kind = "grpo"
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
        config.batch_branches = False  # both branches of guidance in one call: faster to compile, twice the memory
        config.remat = "full"  # what the backward pass finds of the forward pass: full | attention | dots | none
        config.sampling_batches = (
            1  # parts in which a step's prompts are sampled; one is scored while the next is sampled
        )
        config.audit_every = 0  # steps; pictures and raw scores of these go into audit/. 0: of none
        # When more than this share of the last `error_window` steps' samples could not be scored, the run saves and stops.
        config.error_budget = 0.5
        config.error_window = 10
        config.lora = lora_fields(32)
        config.grpo = grpo_fields()
        config.optimizer.update({"name": "adam", "lr": 3e-4, "betas": (0.9, 0.999), "weight_decay": 0.0})
        del config.optimizer["trainable"]  # the LoRA is what is trained, or all of the transformer
        return config

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Builds everything that the configuration describes and that costs nothing."""
        devices = batch_shards(mesh)
        grpo = read_grpo(config, devices)
        samples = config.num_prompts * grpo.group_size
        part = samples // grpo.updates_per_rollout
        if (
            samples % grpo.updates_per_rollout
            or part % (grpo.micro_batch or part)
            or (grpo.micro_batch or part) % devices
        ):
            raise ConfigError(
                f"num_prompts * group_size = {samples} samples cannot be split into {grpo.updates_per_rollout} updates "
                f"of micro-batches of {grpo.micro_batch or part} on {devices} devices; choose num_prompts, "
                "grpo.updates_per_rollout and grpo.micro_batch that divide, and leave each device a sample."
            )
        if config.sampling_batches < 1 or config.num_prompts % config.sampling_batches:
            raise ConfigError(
                f"num_prompts = {config.num_prompts} cannot be sampled in {config.sampling_batches} batches; choose a divisor."
            )
        if samples // config.sampling_batches % devices:
            raise ConfigError(
                f"A sampling batch of {samples // config.sampling_batches} samples cannot be split over {devices} devices; "
                "choose fewer sampling_batches."
            )
        if not 0 <= config.error_budget <= 1 or config.error_window < 1:
            raise ConfigError(
                f"error_budget is {config.error_budget} over {config.error_window} steps; use a share of 0 to 1 and at "
                "least one step."
            )
        for field, known in {"reference": ("stage_start", "base"), "reference_mode": ("sample", "mode")}.items():
            if config[field] not in known:
                raise ConfigError(f"{field} is '{config[field]}'; use one of {', '.join(known)}.")
        if config.negative_prompt is not None and grpo.guidance_scale == 1:
            raise ConfigError(
                "negative_prompt changes nothing at grpo.guidance_scale 1, which is no guidance; raise it, or leave negative_prompt out."
            )
        if not grpo.weights:
            raise ConfigError("there is no reward with a weight; name one in `rewards`.")
        check_policy(config.remat)
        check_lora(config.lora)
        if config.reference == "base" and (not config.lora.rank or config.lora.init):
            raise ConfigError(
                "reference='base' continues the LoRA of the stage before; give lora.rank its rank and leave lora.init empty."
            )
        make_optimizer(config.optimizer, config.steps * grpo.updates_per_rollout)
        entries = make_entries(config.rewards, mesh)
        check_tasks(entries, make_source(config.source, 0))
        whole = [name for name, entry in entries.items() if entry.reward.groupwise]
        if (
            whole
            and jax.process_count() > 1
            and not _whole_groups(mesh, samples // config.sampling_batches, grpo.group_size)
        ):
            raise ConfigError(
                f"The reward '{whole[0]}' compares the samples of a group, and on this mesh the devices of a process hold parts "
                f"of groups; make num_prompts / sampling_batches a multiple of {devices}."
            )
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
        bundle = dataclasses.replace(bundle, params=held)
        super().__init__(config, bundle, context)
        self.grpo = read_grpo(config, batch_shards(context.mesh))
        tell_micro_batch(context.name, config, batch_shards(context.mesh), context.log)
        pixels = bundle.vae.config.downsampling * bundle.transformer.config.patch_size
        pictures.check_size(config.height, config.width, pixels)
        self.transformer = bundle.transformer.clone(remat=config.remat)
        self.scale = scale_of(config.lora) if config.lora.rank else None  # of the LoRA; None: there is none
        # The LoRA under which the KL is measured; None: the bare weights.
        self.reference_lora = self.place(self._new_trained(self.params["transformer"])) if config.lora.init else None
        self.source = make_source(config.source, context.data_seed())
        self.scorer = Scorer(make_entries(config.rewards, context.mesh, context.precision))
        self.samples = config.num_prompts * self.grpo.group_size
        self.prompts_at_once = config.num_prompts // config.sampling_batches
        self.samples_at_once = self.prompts_at_once * self.grpo.group_size
        self.optimizer = make_optimizer(config.optimizer, config.steps * self.grpo.updates_per_rollout)
        self.sigmas = bundle.scheduler.sigmas(self.grpo.num_steps)
        self.failed = collections.deque(maxlen=config.error_window)  # samples of each of the last steps
        self._told: set[str] = set()  # rewards whose first failure was reported
        self._told_difference = False  # whether sampler and trainer were said to differ

        sharded = batch_sharding(context.mesh)
        policy, outside = guided_policies(self._network, self.grpo, config.batch_branches)
        self._encode = jax.jit(self._encode_batch, out_shardings=sharded)
        self._noise = jax.jit(self._draw_noise, out_shardings=sharded)
        # Samples of a group that share their first noise are one sample until the window's first step.
        self.shared = config.same_latent and self.grpo.window is not None
        over_time, whole = NamedSharding(context.mesh, RULES.spec(None, "batch")), replicated(context.mesh)
        places = Trajectory(over_time, over_time, over_time if self.grpo.keeps_means else None, whole, whole)
        groups = self.prompts_at_once if self.shared else None
        self.at_once = context.gather == "update"
        prepare = {"prepare": gathered} if self.at_once else {}
        self._rollout = make_rollout(policy, self.grpo, outside, groups, out_shardings=places, **prepare)
        self._decode = jax.jit(lambda params, latents: sampling.decode_latents(bundle.vae, params, latents[-1]))
        self._join = jax.jit(_join, out_shardings=(places, sharded))
        # Updates and micro-batches take an equal part of every group, if they can.
        self.micro_batch = self.grpo.micro_batch or self.samples // self.grpo.updates_per_rollout
        one_step = self.grpo.trained_steps == 1
        self.shared_update = self.shared and one_step and self.micro_batch % config.num_prompts == 0
        trained = once_per_group(policy, config.num_prompts) if self.shared_update else policy
        self._update = make_update(trained, self.optimizer, self.grpo, donate_argnames="state", **prepare)
        self.ahead = BackgroundCompiler(context.mesh, lambda sentence: context.log(f"{context.name}: {sentence}"))
        tuned = dataclasses.replace(bundle, transformer=self.transformer)
        self.evaluators = make_evaluators(config.evaluations, tuned, *context.evaluates)

    @property
    def params(self) -> dict[str, Any]:
        return self.bundle.params

    def _policy(self, params: Any, trained: Any) -> tuple[Any, Any]:
        """The transformer's parameters and LoRA that the state's tree means; None is the reference."""
        if trained is None:
            return params, None
        return (merge_params(trained, params), None) if self.scale is None else (params, scaled(trained, self.scale))

    def _network(self, params: Any, lora: Any, latents: jax.Array, sigma: jax.Array, inputs: Any) -> jax.Array:
        conditioning = (inputs["context"], inputs["pooled"])
        params, lora = self._policy(params, lora)
        steps = self.bundle.scheduler.num_train_timesteps
        velocity = sampling.velocity_fn(
            self.transformer, params, conditioning, inputs.get("references"), lora=lora, num_train_timesteps=steps
        )
        return velocity(latents, sigma)

    def _encode_batch(self, params: Any, tokens: Any, negative: Any, sources: Any, key: jax.Array) -> dict[str, Any]:
        """Conditioning of every sample from a row per prompt: 'cond' and, with guidance, 'uncond', leaves [B, ...]."""
        repeat = lambda x: jnp.repeat(x, self.grpo.group_size, axis=0)
        apply, count = self.bundle.conditioner.apply, self.prompts_at_once
        shared = {}
        if sources is not None and self.bundle.conditioner.latent_references:
            # A group shares its reference, so that its samples differ by their own noise alone.
            keys = jax.random.split(key, count) if self.config.reference_mode == "sample" else None
            latents = sampling.encode_images(self.bundle.vae, params["vae"], sources, keys)
            shared["references"] = repeat(latents[:, None])
        context, pooled = apply(params["conditioner"], tokens)
        inputs = {"cond": {"context": repeat(context), "pooled": repeat(pooled), **shared}}
        if negative is not None:
            context, pooled = apply(params["conditioner"], negative)
            one = context.shape[0] == 1
            spread = (lambda x: jnp.broadcast_to(x, (self.samples_at_once, *x.shape[1:]))) if one else repeat
            inputs["uncond"] = {"context": spread(context), "pooled": spread(pooled), **shared}
        return inputs

    def _draw_noise(self, key: jax.Array) -> jax.Array:
        factor = self.bundle.vae.config.downsampling
        size = (self.config.height // factor, self.config.width // factor, self.transformer.config.in_channels)
        groups = self.prompts_at_once if self.config.same_latent else self.samples_at_once
        noise = jax.random.normal(key, (groups, *size), jnp.float32)
        return jnp.repeat(noise, self.samples_at_once // groups, axis=0)

    def _place(self, tree: Any) -> Any:
        """One row per prompt, split over the devices when that comes out even."""
        even = self.prompts_at_once % batch_shards(self.context.mesh) == 0
        return shard_batch(tree, self.context.mesh) if even else jax.device_put(tree, replicated(self.context.mesh))

    def init(self) -> PolicyState:
        """What is trained: a LoRA as `training.low_rank.new_lora` has it, or the one of the stage before under `reference='base'`, or
        all of the transformer."""
        kept = self.params.get("lora") if self.config.reference == "base" else None
        new = self._new_trained(self.params["transformer"])
        if kept is not None and jax.tree.map(jnp.shape, kept) != jax.tree.map(jnp.shape, new):
            raise ConfigError(
                f"Stage '{self.context.name}' continues a LoRA of rank {jax.tree.leaves(kept)[0].shape[-1]} on "
                f"{count_matrices(kept)} matrices, and its own has rank {self.config.lora.rank} on {count_matrices(new)}; make lora equal."
            )
        return self.place(init_state(new if kept is None else kept, self.optimizer))

    def _new_trained(self, params: Any) -> Any:
        config = self.config.lora
        if self.scale is None:
            return self.context.precision.lift(split_params(params, ".*", self.bundle.backbone.never_trained)[0])
        return new_lora(config, self.context.key(NO_STEP), params, self.transformer.config)

    def programs(self) -> list[Program]:
        config, mesh, params, size = self.config, self.context.mesh, self.params, self.samples_at_once
        records = self.source.batch(0, 1)
        edited = source_pictures(records, config.height, config.width)
        per_prompt = lambda tree: described_rows(tree, self.prompts_at_once, mesh)
        tokens = per_prompt(self.bundle.conditioner.tokenize([records[0].prompt], edited))
        negative = None
        if self.grpo.guidance_scale != 1:
            negative = tokenize_negative(self.bundle.conditioner, config.negative_prompt, edited)
            own = self.bundle.conditioner.reads_images and edited is not None
            negative = per_prompt(negative) if own else described_whole(negative, mesh)
        sources = None if edited is None else per_prompt(stack_sources(edited))
        key = jax.eval_shape(lambda: self.context.key(0))
        encode = (params, tokens, negative, sources, key)
        inputs = described_rows(jax.eval_shape(self._encode, *encode), size, mesh)
        noise = described_rows(jax.eval_shape(self._draw_noise, key), size, mesh)
        trained = jax.eval_shape(self._new_trained, params["transformer"])
        state = described(mesh, jax.eval_shape(lambda trained: init_state(trained, self.optimizer), trained))
        roll = (params["transformer"], state.lora, inputs, noise, key, described_whole(self.sigmas, mesh))
        update = self._update_arguments(state, roll, inputs)
        latents = self._rollout.eval_shape(*roll).latents
        first = 0 if self.grpo.window is None else sum(self.grpo.window[1]) // 2
        sampled, trained = self._evaluations("references" in inputs["cond"], first)
        weights = ("parameters", *["batch"] * 4)
        frozen = "gathered" if self.at_once else "parameters"
        rolled, updated = (frozen, "parameters", *["batch"] * 4), (frozen, "state", *["batch"] * 4)
        summed, times = self.samples // self.micro_batch * self.grpo.trained_steps, config.sampling_batches
        return [
            Program("encode", self._encode, encode, {}, 0.0, weights, calls=times),
            Program("rollout", self._rollout, roll, {}, sampled / times, rolled, calls=times),
            Program("decode", self._decode, (params["vae"], latents), {}, 0.0, weights[:2], calls=times),
            Program("update", self._update, update, {}, trained, updated, gradients=summed),
        ]

    def _update_arguments(self, state: PolicyState, roll: tuple[Any, ...], inputs: Any) -> tuple[Any, ...]:
        """Of the update that follows the rollouts with arguments like `roll`; what those give is described."""
        parts = self.config.sampling_batches
        trajectory = self._rollout.eval_shape(*roll)
        if parts > 1:
            trajectory, inputs = self._join.eval_shape([(trajectory, inputs)] * parts)
        advantages = described_rows(np.zeros(1, np.float32), self.samples, self.context.mesh)
        return self.params["transformer"], state, self.reference_lora, trajectory, advantages, inputs

    def _sample(
        self, state: PolicyState, records: list[PromptRecord], key: jax.Array, part: int
    ) -> tuple[tuple[Trajectory, Any], np.ndarray]:
        """Trajectories of the samples for these prompts, their conditioning, and the pictures of this process's devices."""
        config, params, conditioner = self.config, self.params, self.bundle.conditioner
        encode_key, noise_key, rollout_key = jax.random.split(key, 3)
        own_keys = (encode_key, noise_key)
        if config.sampling_batches > 1:  # the window is drawn once for the step
            own_keys = (jax.random.fold_in(own, part) for own in own_keys)
        encode_key, noise_key = own_keys
        edited = source_pictures(records, config.height, config.width)
        tokens = self._place(conditioner.tokenize([record.prompt for record in records], edited))
        negative = None
        if self.grpo.guidance_scale != 1:
            negative = tokenize_negative(conditioner, config.negative_prompt, edited)
            alone = len(jax.tree.leaves(negative)[0]) == 1
            negative = jax.device_put(negative, replicated(self.context.mesh)) if alone else self._place(negative)
        sources = None if edited is None else self._place(stack_sources(edited))
        inputs = self._encode(params, tokens, negative, sources, encode_key)
        noise = self._noise(noise_key)
        sigmas = jax.device_put(self.sigmas, replicated(self.context.mesh))
        roll = (params["transformer"], state.lora, inputs, noise, rollout_key, sigmas)
        if (edits := edited is not None) not in self.ahead:  # compiled while the first rollout is
            self.ahead.ask(edits, "the update", self._update, *self._update_arguments(state, roll, inputs))
        number = jax.device_put(np.int32(part), replicated(self.context.mesh)) if config.sampling_batches > 1 else None
        trajectory = self._rollout(*roll, number)
        # Each process has the pictures of its own devices, and scores those.
        images = to_uint8(rows_to_host(self._decode(params["vae"], trajectory.latents), self.context.mesh))
        return (trajectory, inputs), images

    def step(self, state: PolicyState, step: int) -> tuple[PolicyState, dict[str, float]]:
        """Rollouts, rewards, updates."""
        started = time.perf_counter()
        records = self._agreed(self.source.batch(step, self.config.num_prompts))
        key, sampled, scoring, over = self.context.key(step), [], [], threading.Event()
        for part in range(self.config.sampling_batches):
            own = records[part * self.prompts_at_once :][: self.prompts_at_once]
            made, images = self._sample(state, own, key, part)
            sampled.append(made)
            scoring.append(self._start_scoring(images, own, step, part, over))
        trajectory, inputs = sampled[0] if len(sampled) == 1 else self._join(sampled)
        del sampled, made
        rolled_out = time.perf_counter()

        advantages, metrics = self._advantages([result() for result in scoring], records)
        self._check_budget(metrics["failed"], step)
        scored = time.perf_counter()

        first_step = int(jax.device_get(trajectory.steps)[0])
        if metrics["failed"] < self.samples:
            advantages = shard_batch(advantages, self.context.mesh)
            state, update = self.ahead[records[0].image is not None](
                self.params["transformer"], state, self.reference_lora, trajectory, advantages, inputs
            )
            metrics |= {name: float(value) for name, value in jax.device_get(update).items()}
            self._tell_difference(metrics["log_prob_difference"], step)
        updated = time.perf_counter()
        busy = rolled_out - started + updated - scored
        flops = self._flops("references" in inputs["cond"], first_step)
        metrics |= {
            "seconds_rollout": rolled_out - started,
            "seconds_reward": scored - rolled_out,  # what of it was waited for
            "seconds_update": updated - scored,
            "samples_per_second": self.samples / (updated - started),
            "model_tflops_per_second": flops / busy / 1e12,
        }
        return state, metrics

    def _agreed(self, records: list[PromptRecord]) -> list[PromptRecord]:
        """The records; a picture that one process could not read counts as unread for all of them."""
        own = {str(i): record.error for i, record in enumerate(records) if record.error}
        errors: dict[str, str] = {}
        for found in gather_json(own, self.context.mesh):
            errors = found | errors
        return [
            dataclasses.replace(record, image=UNREAD, key=f"{record.prompt}\nunread {i}", error=errors[str(i)])
            if str(i) in errors
            else record
            for i, record in enumerate(records)
        ]

    def _start_scoring(
        self, images: np.ndarray, records: list[PromptRecord], step: int, part: int, over: threading.Event
    ) -> Callable[[], Scored]:
        """Scores of a part's samples from all processes, each of which begins now with its own pictures.

        An error in a reward sets `over`, which the parts of a step share.
        """
        mesh, count = self.context.mesh, self.samples_at_once
        rows = local_rows(mesh, count)
        repeated = [records[row // self.grpo.group_size] for row in rows]
        result = self.scorer.start(list(images), repeated, over)
        heard = row_owners(mesh)[jax.process_index()] == jax.process_index()
        audited = heard and self.config.audit_every and step % self.config.audit_every == 0

        def scored() -> Scored:
            own = result()
            if audited:
                folder = self.context.workdir / "audit" / self.context.name / f"{step:06d}"
                write_audit(folder, part * count + rows, images, repeated, own)
            for name, sentences in own.errors.items():
                if sentences and name not in self._told:
                    self._told.add(name)
                    self.context.log(
                        f"{self.context.name}, step {step}: the reward '{name}' failed: {next(iter(sentences.values()))}"
                    )
            everywhere = lambda tree: {name: gather_rows(values, mesh, count) for name, values in tree.items()}
            return own._replace(values=everywhere(own.values), asked=everywhere(own.asked))

        return scored

    def _advantages(self, parts: list[Scored], records: list[PromptRecord]) -> tuple[np.ndarray, dict[str, float]]:
        """Advantages [B] and statistics of all samples; a statistic over nothing is left out."""
        entries = self.scorer.entries
        groups = [record.key for record in records for _ in range(self.grpo.group_size)]
        values, asked = (
            {name: np.concatenate([getattr(part, field)[name] for part in parts]) for name in entries}
            for field in ("values", "asked")
        )
        scaled = {name: normalize(values[name], groups, entries[name].normalize) for name, _ in self.grpo.weights}
        total = combine_rewards(scaled, self.grpo.weights, asked)
        advantages, stats = group_advantages(
            total, groups, global_std=self.grpo.global_std, clip=self.grpo.adv_clip_max
        )
        metrics = {"reward": stats.pop("reward_mean"), **stats}
        for name, scores in values.items():
            valid = scores[~np.isnan(scores)]
            metrics[f"reward_{name}_failed"] = float(asked[name].sum() - len(valid))
            if len(valid):
                metrics |= {f"reward_{name}": float(valid.mean()), f"reward_{name}_std": float(valid.std())}
        return advantages, {name: value for name, value in metrics.items() if not np.isnan(value)}

    def _tell_difference(self, difference: float, step: int) -> None:
        """Says so, once, when sampler and trainer differ by more than ratios may."""
        if self._told_difference or not difference > self.grpo.clip_range:
            return
        self._told_difference = True
        advice = (
            "no ratio depends on it, so that rounding to bfloat16 does no harm; when the run computes in float32, look for what "
            "rollout and update do differently"
            if self.grpo.old_log_probs == "trainer"
            else "samples are clipped that no update has moved; set grpo.old_log_probs='trainer' or compute in float32"
        )
        self.context.log(
            f"{self.context.name}, step {step}: log_prob_difference between sampler and trainer is {difference:.1e}, above "
            f"grpo.clip_range = {self.grpo.clip_range:.0e}; {advice}."
        )

    def _check_budget(self, failed: float, step: int) -> None:
        """Raises a `TrainingPaused` when too much of the last steps could not be scored."""
        self.failed.append(failed)
        share = sum(self.failed) / (len(self.failed) * self.samples)
        if len(self.failed) == self.failed.maxlen and share > self.config.error_budget:
            raise TrainingPaused(
                f"{share:.0%} of the samples of stage '{self.context.name}' could not be scored in the {len(self.failed)} "
                f"steps up to step {step}; repair the reward ({', '.join(self.scorer.entries)}) or the pictures to edit, then run the "
                "same command."
            )

    def _flops(self, edits: bool, first: int) -> int:
        """Of the transformer in one step whose window begins at step `first`."""
        return sum(self._evaluations(edits, first))

    def _evaluations(self, edits: bool, first: int) -> tuple[int, int]:
        """FLOPs of the rollout and of the update."""
        config, grpo = self.transformer.config, self.grpo
        pixels = self.bundle.vae.config.downsampling * config.patch_size
        tokens = (self.config.height // pixels) * (self.config.width // pixels)
        forward = self.bundle.backbone.flops(
            config, tokens, self.bundle.conditioner.context_length, tokens if edits else 0
        )
        branches = 1 if grpo.guidance_scale == 1 else 2
        inside = branches if grpo.cfg_in_window else 1
        sampled = self.samples * ((grpo.num_steps - grpo.trained_steps) * branches + grpo.trained_steps * inside)
        if self.shared:
            sampled -= (self.samples - self.config.num_prompts) * (first * branches + inside)
        trained = self.samples * grpo.trained_steps * inside
        if self.shared_update:
            trained = self.samples // self.micro_batch * self.config.num_prompts * inside
        reference, updates = grpo.kl_beta > 0, grpo.updates_per_rollout
        old = trained // updates * (updates - 1) if grpo.old_log_probs == "trainer" else 0
        update = grpo_step_flops(forward, 0, trained, reference, old, trains_weights=self.scale is None)
        return grpo_step_flops(forward, sampled, 0, reference), update

    def _kept(self, state: PolicyState) -> Any:
        return state.ema if self.config.use_ema else state.lora

    def evaluate(self, state: PolicyState, step: int) -> dict[str, Any]:
        """All evaluations with the LoRA that the stage would keep."""
        del step
        result: dict[str, Any] = {"metrics": {}, "scores": {}, "images": {}}
        params, lora = self._policy(self.params["transformer"], self._kept(state))
        for evaluator in self.evaluators:
            for part, values in evaluator.run({**self.params, "transformer": params}, lora).items():
                result[part] |= values
        return result

    def close(self) -> None:
        self.ahead.close()

    def finish(self, state: PolicyState) -> Any:
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

    def export(self, state: PolicyState, folder: Path) -> None:
        """The LoRA in the file that diffusers' `load_lora_weights` reads."""
        if self.scale is not None:
            export_lora(folder, self._kept(state), self.config.lora.alpha, self.transformer.config)
