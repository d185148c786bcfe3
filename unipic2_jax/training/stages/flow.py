"""Flow-matching training of the transformer, alone or with its conditioner (paper section 3.1)."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, config_dict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.batches import BatchPlan, BatchShape
from unipic2_jax.data.collate import Collate
from unipic2_jax.data.examples import ExampleSource
from unipic2_jax.data.loader import Loader
from unipic2_jax.data.prompts import PromptSource
from unipic2_jax.evaluation.evaluator import check_evaluation, evaluation_sources, make_evaluators
from unipic2_jax.flow.loss import flow_step_flops
from unipic2_jax.flow.timesteps import TimestepSampling
from unipic2_jax.models.bundle import Bundle, for_training
from unipic2_jax.models.remat import check_policy
from unipic2_jax.optim.optimizer import check_rules, make_optimizer, merge_params, split_params
from unipic2_jax.parallel.mesh import batch_shards, described_rows, described_whole, replicated, shard_batch
from unipic2_jax.parallel.processes import local_rows, tree_to_host
from unipic2_jax.parallel.rules import described
from unipic2_jax.training.compiling import BackgroundCompiler
from unipic2_jax.training.low_rank import check_lora, export_lora, lora_fields, merged, new_lora, scale_of
from unipic2_jax.training.stage import NO_STEP, STAGES, Program, Stage, StageContext, stage_fields
from unipic2_jax.training.stages.flow_batches import Pool, make_plan, make_sources
from unipic2_jax.training.stages.flow_step import FlowState, FlowStep

LATENTS = ("mode", "sample")


@STAGES.register("flow")
class FlowStage(Stage):
    """Trains on `tasks` in turn, one task and one bucket a batch, as the paper alternates text-to-image and editing.

    With `pool` > 0 the first so many examples of each task are encoded once and drawn from at random; with 0 every step
    goes on through the data. What is evaluated and kept is the moving average of the weights.
    """

    bundle: Bundle

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The paper's optimizer; timestep sampling and caption dropout as in its lineage."""
        config = stage_fields()
        config.kind = "flow"
        config.data = {}  # see data.examples.make_examples
        config.tasks = ("t2i", "edit")  # the turn; a task may come several times
        # (Part of the steps after which it holds, resolution in pixels; 0: the data's own.) ((0, 256), (0.5, 512)) grows halfway.
        config.resolutions = ((0.0, 0),)
        config.pool = 0
        config.batch_size = 128
        config.accumulation = 1  # parts that a batch is computed in, one after the other
        # What the backward pass finds of the forward pass: full | attention | dots | none, or auto: as the plan finds it fastest, and then
        # `accumulation` 0 is as few parts as fit (`perf.split`).
        config.remat = "full"
        config.latents = "mode"  # of pictures under the VAE: mode | sample
        config.loader_threads = 16
        config.caption_dropout = ConfigDict({"t2i": 0.1, "edit": 0.0})
        # Of noise levels; without a shift they have that of the model's own scheduler.
        config.timesteps = ConfigDict(dataclasses.asdict(TimestepSampling()))
        config.timesteps.shift = config_dict.placeholder(float)
        config.weighting = "none"
        config.ema_decay = 0.999
        config.lora = lora_fields(0)
        config.validation = ConfigDict({"data": {}, "batches": 4, "sigmas": (0.1, 0.3, 0.5, 0.7, 0.9), "seed": 0})
        config.evaluations = {}
        config.optimizer.update({"lr": 4e-5, "schedule": "cosine", "trainable": "^transformer/"})
        return config

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Builds everything that the configuration describes and that costs nothing."""
        make_plan(config, make_sources(config, config.data, 0), 0)
        for task in config.tasks:
            if task not in config.caption_dropout:
                raise ConfigError(f"caption_dropout has no rate for the task '{task}'; add one.")
        if config.latents not in LATENTS:
            raise ConfigError(f"latents is '{config.latents}'; use one of {', '.join(LATENTS)}.")
        check_policy(config.remat)
        read_timesteps(config)
        make_optimizer(config.optimizer, config.steps)
        check_lora(config.lora)
        if config.lora.rank and config.optimizer.trainable != cls.default_config().optimizer.trainable:
            raise ConfigError(
                f"optimizer.trainable is '{config.optimizer.trainable}', and of a stage with lora.rank = {config.lora.rank} the LoRA is "
                "all that is trained; leave one of the two out."
            )
        devices = batch_shards(mesh)
        if config.accumulation == 0:
            raise ConfigError(
                "accumulation is 0, which leaves it to the plan, and that chooses with remat='auto' alone; give a number, or that."
            )
        if config.accumulation < 1 or config.batch_size % (config.accumulation * devices):
            raise ConfigError(
                f"A batch of {config.batch_size} cannot be split into {config.accumulation} parts over {devices} devices; "
                "choose numbers that divide."
            )
        if config.validation.data:
            make_plan(config, make_sources(config, config.validation.data, 0), 0)
        for name, fields in config.evaluations.items():
            check_evaluation(name, fields)

    @classmethod
    def prompt_sources(cls, config: ConfigDict) -> list[PromptSource]:
        return evaluation_sources(config.evaluations)

    def __init__(self, config: ConfigDict, bundle: Bundle, context: StageContext):
        scale = scale_of(config.lora) if config.lora.rank else None
        self.trained, frozen = _divided(config, bundle, context)
        self.frozen = context.precision.hold(frozen)
        params = self.frozen if scale is not None else merge_params(self.trained, self.frozen)
        super().__init__(config, bundle.replace(params=params), context)
        if config.pool and "vae" in self.trained:
            raise ConfigError("A pool is encoded once, by a VAE that optimizer.trainable trains here; set pool=0.")
        self.flow_step = self._make_step(scale)
        check_rules(config.optimizer.lr_scales, self.trained)
        self._encode = jax.jit(self.flow_step.moments)
        self._train = jax.jit(self.flow_step.train_step, static_argnames="task", donate_argnames="state")
        self._validate = jax.jit(self.flow_step.validation_losses, static_argnames="sigmas")
        self.collate = Collate(bundle.conditioner, config.caption_dropout)
        sources = make_sources(config, config.data, context.data_seed())
        self.plan = make_plan(config, sources, context.data_seed())
        self.loader = self._loader(sources, self.plan)
        self.pool = Pool(self.loader, context.data_seed(), config.pool, self._encoded) if config.pool else None
        self.evaluators = make_evaluators(config.evaluations, self.bundle, *context.evaluates)
        # Caches; whatever is not in them is made again, the same.
        self.ahead = BackgroundCompiler(context.mesh, lambda sentence: context.log(f"{context.name}: {sentence}"))
        self._phases_asked: set[int] = set()  # whose programs were asked for
        self._dropped: dict[str, Any] = {}  # by task, see `_stand_in`

    def _make_step(self, scale: float | None) -> FlowStep:
        """What the programs compute."""
        config, context, bundle = self.config, self.context, self.bundle
        sampling = read_timesteps(config, bundle.scheduler.shift)
        if config.timesteps.shift is None:
            context.log(f"{context.name}: noise levels have the shift of the model's scheduler, {sampling.shift:g}.")
        networks = for_training(bundle, config.remat)
        return FlowStep(
            vae=bundle.vae,
            transformer=networks.transformer,
            conditioner=networks.conditioner,
            num_train_timesteps=bundle.scheduler.num_train_timesteps,
            optimizer=make_optimizer(config.optimizer, config.steps),
            sampling=sampling,
            weighting=config.weighting,
            caption_dropout=config.caption_dropout,
            sample_latents=config.latents == "sample",
            lora_scale=scale,
            accumulation=config.accumulation,
            ema_decay=config.ema_decay,
        )

    def _loader(self, sources: dict[str, ExampleSource], plan: BatchPlan) -> Loader:
        rows = local_rows(self.context.mesh, self.config.batch_size)
        return Loader(sources, plan, self.collate, threads=self.config.loader_threads, rows=rows)

    def _encoded(self, pictures: dict[str, Any]) -> dict[str, Any]:
        """The VAE's moments of pictures, on the host."""
        return tree_to_host(self._encode(self.bundle.params["vae"], shard_batch(pictures, self.context.mesh)))

    def _new_state(self, trained: Any) -> FlowState:
        # Of its own arrays each, since a step gives up those of the state before.
        lifted, ema = (self.context.precision.lift(trained) for _ in range(2))
        return FlowState(lifted, self.flow_step.optimizer.init(lifted), ema)

    def init(self) -> FlowState:
        return self.place(self._new_state(self.trained))

    def release(self) -> None:
        for leaf in jax.tree.leaves(self.trained):
            leaf.delete()

    def programs(self) -> list[Program]:
        mesh, size = self.context.mesh, self.config.batch_size
        state = described(mesh, jax.eval_shape(self._new_state, self.trained))
        frozen, key = described(mesh, self.frozen), jax.eval_shape(lambda: self.context.key(0))
        starts = [*(first for first, _ in self.plan.phases), self.config.steps]
        made = []
        for phase, (start, end) in enumerate(itertools.pairwise(starts)):
            shapes = self.plan.shapes(phase)
            for shape in shapes:
                batch = self.collate(shape, [self.loader.example(shape, 0)])
                dropped = described_whole(self._stand_in(shape.task, batch), mesh)
                rows, step = described_rows(batch, size, mesh), jax.ShapeDtypeStruct((), jnp.int32)
                turns = self.config.tasks.count(shape.task) / len(self.config.tasks)
                alike = sum(other.task == shape.task for other in shapes)
                calls = (end - start) / self.config.steps * turns / alike
                arguments = (state, frozen, rows, dropped, key, step)
                name, task, flops = f"step, {shape}", {"task": shape.task}, self._flops(shape)
                roles = ("state", "parameters", "batch", "batch", "batch", "batch")
                made.append(Program(name, self._train, arguments, task, flops, roles, calls, self.config.accumulation))
        return made

    def _stand_in(self, task: str, batch: dict[str, Any]) -> dict[str, Any]:
        """What stands for every dropped caption of a task: a row of 'empty_tokens', or of 'empty_conditioning' where conditioning is
        stored. Nothing where no caption is dropped, or where each example has empty tokens of its own, since they hold its picture.

        Raises:
          ConfigError: for stored conditioning that does not go with what is trained, or with dropped captions.
        """
        if "conditioning" in batch and "conditioner" in self.trained:
            raise ConfigError(
                "Stored conditioning leaves nothing to learn for the conditioner, which optimizer.trainable trains; take it "
                "out of data.stored, or train the transformer alone."
            )
        if not self.config.caption_dropout[task] or "empty_tokens" in batch:
            return {}
        tokens = self.collate.no_prompt()
        if "conditioning" not in batch:
            return {"empty_tokens": tokens}
        if self.bundle.conditioner.reads_images and task == "edit":
            raise ConfigError("Stored conditioning has no dropped captions of edits; set caption_dropout.edit=0.")
        apply = jax.jit(self.bundle.conditioner.apply)
        return {"empty_conditioning": apply(self.bundle.params["conditioner"], tokens)}

    def _arguments(self, state: FlowState, shape: BatchShape, batch: dict[str, Any], step: int) -> tuple[Any, ...]:
        """The arguments of the training step, on the mesh."""
        if shape.task not in self._dropped:
            row = self._stand_in(shape.task, batch)
            self._dropped[shape.task] = jax.device_put(row, replicated(self.context.mesh))
        placed = shard_batch(batch, self.context.mesh, local=True)
        number = jax.device_put(np.int32(step))
        return state, self.frozen, placed, self._dropped[shape.task], self.context.key(step), number

    def _ask_for(self, shape: BatchShape, arguments: tuple[Any, ...]) -> Hashable:
        """Has the training step compiled for these arguments' shapes, unless it is; its key in `ahead`."""
        key = shape.task, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[2]))
        self.ahead.ask(key, f"the step for {shape}", self._train, *arguments, task=shape.task)
        return key

    def _ask_for_phases(self, state: FlowState, step: int) -> None:
        """Has everything compiled that this step's phase and the next one need, so that a new shape holds nothing up."""
        phase = self.plan.phase(step)
        for number in range(phase, min(phase + 2, len(self.plan.phases))):
            shapes = [] if number in self._phases_asked else self.plan.shapes(number)
            self._phases_asked.add(number)
            for shape in shapes:
                # One example stands for all, since only shapes matter.
                batch = self.collate(shape, [self.loader.example(shape, 0)] * len(self.loader.rows))
                self._ask_for(shape, self._arguments(state, shape, batch, step))

    def step(self, state: FlowState, step: int) -> tuple[FlowState, dict[str, float]]:
        started = time.perf_counter()
        timeline = self.context.timeline
        with timeline.span("data"):
            shape, batch = (self.pool or self.loader).batch(step)
        waited = time.perf_counter() - started
        with timeline.span("place"):
            arguments = self._arguments(state, shape, batch, step)
        key = self._ask_for(shape, arguments)
        if self.pool is None:
            self._ask_for_phases(state, step)
        with timeline.span("compile"):
            program = self.ahead[key]
        started = time.perf_counter()
        with timeline.span("update"):
            state, metrics = program(*arguments)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        busy = time.perf_counter() - started
        speed = {"seconds_data": waited, "model_tflops_per_second": self._flops(shape) / busy / 1e12}
        return state, {**metrics, f"loss_{shape.task}": metrics["loss"], **speed}

    def _flops(self, shape: BatchShape) -> int:
        """Model FLOPs of a step: the transformer's."""
        height, width = shape.size
        patch = self.bundle.vae.config.downsampling * self.bundle.transformer.config.patch_size
        tokens = height * width // patch**2
        text, references = self.bundle.conditioner.context_length, tokens * shape.bucket.references
        references *= self.bundle.conditioner.latent_references
        forward = self.bundle.backbone.flops(self.bundle.transformer.config, tokens, text, references)
        return flow_step_flops(forward, self.config.batch_size, "transformer" in self.trained)

    def validate(self, params: Any) -> dict[str, float]:
        """Losses on the first batches of the held-out data: by task, and by noise level."""
        config = self.config.validation
        if not config.data:
            return {}
        sources = make_sources(self.config, config.data, config.seed)
        plan = make_plan(self.config, sources, config.seed, final=True)
        loader = self._loader(sources, plan)
        by_task: dict[str, list[np.ndarray]] = {}
        for step in range(config.batches * len(plan.tasks)):
            shape, batch = loader.batch(step)
            placed = shard_batch(batch, self.context.mesh, local=True)
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            losses = self._validate(params, placed, key, tuple(config.sigmas))
            by_task.setdefault(shape.task, []).append(jax.device_get(losses))
        metrics = {}
        for task, losses in by_task.items():
            by_level = np.mean(losses, axis=0)
            metrics[f"validation/{task}"] = float(by_level.mean())
            metrics |= {f"validation/{task}/sigma_{s:g}": float(x) for s, x in zip(config.sigmas, by_level)}
        return metrics

    def evaluate(self, state: FlowState, step: int) -> dict[str, Any]:
        del step
        params = merge_params(state.ema, self.frozen)
        result: dict[str, Any] = {"metrics": self.validate(params), "scores": {}, "images": {}}
        applied = self.flow_step.applied(params)
        for evaluator in self.evaluators:
            for part, values in evaluator.run(applied, applied.get("lora")).items():
                result[part] |= values
        return result

    def close(self) -> None:
        self.ahead.close()

    def finish(self, state: FlowState) -> Bundle:
        """The averaged weights, a LoRA merged into them."""
        if (scale := self.flow_step.lora_scale) is not None:
            transformer = merged(self.frozen["transformer"], state.ema["lora"], scale, self.context.precision.trained)
            return self.bundle.replace(params={**self.frozen, "transformer": transformer})
        params = merge_params(state.ema, self.frozen)
        return self.bundle.replace(params={name: params[name] for name in self.bundle.params})

    def export(self, state: FlowState, folder: Path) -> None:
        """The LoRA, if there is one, in the file that diffusers' `load_lora_weights` reads."""
        if self.flow_step.lora_scale is not None:
            export_lora(folder, state.ema["lora"], self.config.lora.alpha, self.bundle.transformer.config)


def _divided(config: ConfigDict, bundle: Bundle, context: StageContext) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a stage trains, a part of the model's parameters or a LoRA beside them, and what it leaves as it is."""
    if not config.lora.rank:
        return split_params(bundle.params, config.optimizer.trainable, bundle.backbone.never_trained)
    transformer = bundle.params["transformer"]
    return {"lora": new_lora(config.lora, context.key(NO_STEP), transformer, bundle.transformer.config)}, bundle.params


def read_timesteps(config: ConfigDict, shift: float = 1.0) -> TimestepSampling:
    """The noise levels of a stage; `shift` is what they have where the stage names none.

    Raises:
      ValueError: when a field is out of range.
    """
    fields = config.timesteps.to_dict()
    return TimestepSampling(**{**fields, "shift": shift if fields["shift"] is None else fields["shift"]})
