"""Flow-matching training of the transformer, alone or with its conditioner (paper section 3.1)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from ml_collections import ConfigDict, config_dict
from tqdm import tqdm

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.batches import BatchPlan, BatchShape
from unipic2_jax.data.examples import Example, ExampleSource, make_examples
from unipic2_jax.data.loader import Loader
from unipic2_jax.data.prompts import PromptSource
from unipic2_jax.evaluation.evaluator import check_evaluation, evaluation_sources, make_evaluators
from unipic2_jax.flow.loss import draw_corruption, flow_losses, flow_step_flops, loss_by_noise
from unipic2_jax.flow.timesteps import TimestepSampling
from unipic2_jax.models.bundle import for_training
from unipic2_jax.models.conditioner import conditioning_with_dropout
from unipic2_jax.models.lora import scaled
from unipic2_jax.models.remat import check_policy
from unipic2_jax.models.sampling import encode_moments, from_uint8, reference_latents, velocity_fn
from unipic2_jax.optim.ema import ema_update
from unipic2_jax.optim.optimizer import check_rules, make_optimizer, merge_params, split_params
from unipic2_jax.parallel.mesh import batch_shards, described_rows, described_whole, replicated, shard_batch
from unipic2_jax.parallel.processes import local_rows, tree_to_host
from unipic2_jax.parallel.rules import constrain_parameters, described
from unipic2_jax.training.compiling import BackgroundCompiler
from unipic2_jax.training.low_rank import check_lora, export_lora, lora_fields, merged, new_lora, scale_of
from unipic2_jax.training.stage import NO_STEP, STAGES, Program, Stage, StageContext, stage_fields

ENCODE_BATCH = 256
LATENTS = ("mode", "sample")


class FlowState(NamedTuple):
    """What changes."""

    trained: Any
    opt_state: Any
    ema: Any


@STAGES.register("flow")
class FlowStage(Stage):
    """Trains on `tasks` in turn, one task and one bucket a batch, as the paper alternates text-to-image and editing.

    With `pool` > 0 the first so many examples of each task are encoded once and drawn from at random; with 0 every step
    goes on through the data. What is evaluated and kept is the moving average of the weights.
    """

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
        config.remat = "full"  # what the backward pass finds of the forward pass: full | attention | dots | none
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

    def __init__(self, config: ConfigDict, bundle: Any, context: StageContext):
        self.scale = scale_of(config.lora) if config.lora.rank else None  # of the LoRA; None: there is none
        if self.scale is None:
            self.trained, frozen = split_params(
                bundle.params, config.optimizer.trainable, bundle.backbone.never_trained
            )
        else:
            frozen = bundle.params
            lora = new_lora(config.lora, context.key(NO_STEP), frozen["transformer"], bundle.transformer.config)
            self.trained = {"lora": lora}
        self.frozen = context.precision.hold(frozen)
        params = self.frozen if self.scale is not None else merge_params(self.trained, self.frozen)
        bundle = dataclasses.replace(bundle, params=params)
        super().__init__(config, bundle, context)
        self.sampling = read_timesteps(config, bundle.scheduler.shift)
        if config.timesteps.shift is None:
            context.log(
                f"{context.name}: noise levels have the shift of the model's scheduler, {self.sampling.shift:g}."
            )
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        check_rules(config.optimizer.lr_scales, self.trained)
        self.networks = for_training(bundle, config.remat)
        # Loaders' threads tokenise, and this one when it compiles; tokenizers do not bear that, nor evaluators beside them.
        self.reader, self.reading = copy.deepcopy(bundle.conditioner), threading.Lock()
        self.sources = make_sources(config, config.data, context.data_seed())
        self.plan = make_plan(config, self.sources, context.data_seed())
        self.loader = self._loader(self.sources, self.plan)
        self.pools: dict[str, dict[str, Any]] = {}
        shapes = {shape for phase in range(len(self.plan.phases)) for shape in self.plan.shapes(phase)}
        if config.pool and len(shapes) > len(set(config.tasks)):
            raise ConfigError(f"A pool needs one shape for each task, and here are {len(shapes)} in all; set pool=0.")
        self._encode = jax.jit(self._moments)
        self._step = jax.jit(self._train_step, static_argnames="task", donate_argnames="state")
        self._validate = jax.jit(self._validation_losses)
        self.ahead = BackgroundCompiler(context.mesh, lambda sentence: context.log(f"{context.name}: {sentence}"))
        self.asked_phase = -1
        self.nothing: dict[str, Any] = {}
        self.evaluators = make_evaluators(config.evaluations, bundle, *context.evaluates)

    # The host's side: examples become batches.

    def _loader(self, sources: dict[str, ExampleSource], plan: BatchPlan) -> Loader:
        rows = local_rows(self.context.mesh, self.config.batch_size)
        return Loader(sources, plan, self._collated, threads=self.config.loader_threads, rows=rows)

    def _collated(self, shape: BatchShape, examples: Sequence[Example]) -> dict[str, Any]:
        """Pictures or what is stored of them, and the prompts' tokens or what is stored of those, [B, ...] each."""
        first, batch = examples[0], {}
        attended = self.reader.latent_references
        stacked = lambda name: np.stack([example.arrays[name] for example in examples])
        if first.image is None:
            moments = [name for name in first.arrays if name.endswith(("mean", "logvar"))]
            batch |= {name: stacked(name) for name in moments if attended or not name.startswith("reference_")}
        else:
            batch["images"] = np.stack([example.image for example in examples])
            if first.references and attended:
                batch["reference_images"] = np.stack([np.stack(example.references) for example in examples])
        if "context" in first.arrays:
            return {**batch, "conditioning": (stacked("context"), stacked("pooled"))}
        with self.reading:
            return {**batch, **self._tokens(examples, dropped=self.config.caption_dropout[shape.task] > 0)}

    def _tokens(self, examples: Sequence[Example], dropped: bool) -> dict[str, Any]:
        """Tokens of the prompts, and where they are read together with images also those of no prompt."""
        prompts = [example.prompt for example in examples]
        if not self.reader.reads_images:
            return {"tokens": self.reader.tokenize(prompts)}
        count, images = len(examples), [example.references for example in examples]
        if not dropped:
            return {"tokens": self.reader.tokenize(prompts, images)}
        both = self.reader.tokenize([*prompts, *[""] * count], images * 2)
        given, empty = (jax.tree.map(lambda x, part=part: x[part], both) for part in (slice(count), slice(count, None)))
        # The pictures, by far the largest part, are the same.
        shared = jax.tree.map(lambda x, y: x if np.array_equal(x, y) else y, given, empty)
        return {"tokens": given, "empty_tokens": shared}

    def _pool(self, task: str) -> dict[str, Any]:
        """The first `pool` examples of a task, encoded; made when a task is first trained on."""
        if task not in self.pools:
            shape = next(shape for shape in self.plan.shapes(0) if shape.task == task)
            starts = range(0, self.config.pool, ENCODE_BATCH)
            parts = []
            for start in tqdm(starts, desc=f"encoding {task} examples", disable=None):
                examples = [self.loader.example(shape, i) for i in range(start, start + ENCODE_BATCH)]
                batch = self._collated(shape, examples)
                pictures = {name: batch.pop(name) for name in ("images", "reference_images") if name in batch}
                moments = self._encode(self.bundle.params["vae"], shard_batch(pictures, self.context.mesh))
                parts.append({**batch, **tree_to_host(moments)})
            self.pools[task] = _concatenate(parts)
        return self.pools[task]

    def _batch(self, step: int) -> tuple[BatchShape, dict[str, Any]]:
        if not self.config.pool:
            return self.loader.batch(step)
        shape = self.plan.place(step).shape
        rng = np.random.default_rng([self.context.data_seed(), step])
        index = rng.integers(self.config.pool, size=self.config.batch_size)
        index = index[local_rows(self.context.mesh, self.config.batch_size)]
        return shape, jax.tree.map(lambda leaf: leaf[index], self._pool(shape.task))

    # The device's side: pure functions of arrays.

    def _moments(self, vae: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """'images' and 'reference_images' as the VAE's moments; without 'logvar' where only modes are used."""
        moments = {}
        for name, prefix in (("images", ""), ("reference_images", "reference_")):
            if name not in batch:
                continue
            flat = batch[name].reshape(-1, *batch[name].shape[-3:])
            found = encode_moments(self.bundle.vae, vae, from_uint8(flat))
            found = [x.reshape(*batch[name].shape[:-3], *x.shape[1:]) for x in found]
            moments[f"{prefix}mean"] = found[0]
            if self.config.latents == "sample":
                moments[f"{prefix}logvar"] = found[1]
        return moments

    def _latents(self, vae: Any, batch: dict[str, Any], keys: jax.Array) -> dict[str, Any]:
        """The batch with normalised 'latents' [B, h, w, C] and 'references' [B, R, h, w, C] instead of pictures."""
        batch = {**batch, **self._moments(vae, batch)}
        sample = self.config.latents == "sample"
        own = {
            "latents": reference_latents(
                self.bundle.vae, batch["mean"], batch["logvar"] if sample else None, keys if sample else None
            )
        }
        if (mean := batch.get("reference_mean")) is not None:
            size, count = mean.shape[:2]
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            latents = reference_latents(
                self.bundle.vae,
                flat(mean),
                flat(batch["reference_logvar"]) if sample else None,
                jnp.repeat(keys, count) if sample else None,
                1 + jnp.tile(jnp.arange(count), size),
            )
            own["references"] = latents.reshape(mean.shape)
        return {**batch, **own}

    def _losses(self, params: Any, batch: dict[str, Any], nothing: Any, corruption: Any, keys: jax.Array) -> jax.Array:
        """Losses [B] of a batch or a part of it; `nothing` is what all dropped captions have in common."""
        batch = self._latents(params["vae"], batch, keys)
        params = self._applied(params)
        given = {"empty_tokens": batch.get("tokens"), "empty_conditioning": batch.get("conditioning")}
        batch = {**given, **nothing, **batch}
        conditioner = self.networks.conditioner
        velocity = velocity_fn(
            self.networks.transformer,
            params["transformer"],
            conditioning_with_dropout(conditioner, params["conditioner"], batch, corruption["drop"]),
            batch.get("references"),
            lora=params.get("lora"),
            num_train_timesteps=self.bundle.scheduler.num_train_timesteps,
        )
        return flow_losses(velocity, batch["latents"], corruption, self.config.weighting)

    def _applied(self, params: Any) -> Any:
        """Parameters whose LoRA, if they have one, is scaled as a network is given it."""
        return params if self.scale is None else {**params, "lora": scaled(params["lora"], self.scale)}

    def _latent_shape(self, batch: dict[str, Any]) -> tuple[int, ...]:
        if "mean" in batch:
            return batch["mean"].shape
        count, height, width, _ = batch["images"].shape
        factor = self.bundle.vae.config.downsampling
        return count, height // factor, width // factor, self.bundle.vae.config.latent_channels

    def _train_step(
        self, state: FlowState, frozen: Any, batch: Any, nothing: Any, key: jax.Array, step: jax.Array, task: str
    ) -> tuple[FlowState, dict[str, jax.Array]]:
        # Everything random is drawn for the whole batch, so that it does not depend on the parts.
        shape = self._latent_shape(batch)
        corruption = draw_corruption(key, shape, self.sampling, self.config.caption_dropout[task])
        keys = jax.random.split(jax.random.fold_in(key, 1), shape[0])

        def loss_fn(trained, batch, corruption, keys):
            losses = self._losses(merge_params(trained, frozen), batch, nothing, corruption, keys)
            return losses.mean(), losses

        gradient_fn = jax.grad(loss_fn, has_aux=True)
        parts = self.config.accumulation
        if parts == 1:
            gradients, losses = gradient_fn(state.trained, batch, corruption, keys)
        else:
            # Every device keeps its examples and has some of each part.
            split = lambda x: rearrange(x, "(b parts) ... -> parts b ...", parts=parts)
            whole = {"batch": batch, "corruption": corruption, "keys": keys}

            def accumulate(total, part):
                gradients, losses = gradient_fn(state.trained, **part)
                total = jax.tree.map(lambda t, g: t + g / parts, total, gradients)
                return constrain_parameters(total), losses

            zeros = constrain_parameters(jax.tree.map(jnp.zeros_like, state.trained))
            gradients, losses = jax.lax.scan(accumulate, zeros, jax.tree.map(split, whole))
            losses = rearrange(losses, "parts b -> (b parts)")
        gradients = constrain_parameters(gradients)
        changes, opt_state = self.optimizer.update(gradients, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, changes)
        ema = ema_update(state.ema, trained, step, self.config.ema_decay, 1)
        metrics = {**loss_by_noise(losses, corruption["sigma"]), "gradient_norm": optax.global_norm(gradients)}
        return constrain_parameters(FlowState(trained, opt_state, ema)), metrics

    def _validation_losses(self, params: Any, batch: Any, key: jax.Array) -> jax.Array:
        """Mean losses [S] at the levels of `validation.sigmas`, all with the same noise."""
        shape = self._latent_shape(batch)
        corruption = draw_corruption(key, shape, self.sampling)
        keys = jax.random.split(key, shape[0])
        level = lambda sigma: self._losses(
            params, batch, {}, {**corruption, "sigma": jnp.full(shape[:1], sigma)}, keys
        ).mean()
        return jax.lax.map(level, jnp.asarray(self.config.validation.sigmas, jnp.float32))

    # The stage.

    def _new_state(self, trained: Any) -> FlowState:
        own, ema = (self.context.precision.lift(trained) for _ in range(2))
        return FlowState(own, self.optimizer.init(own), ema)

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
        found = []
        for phase, (start, end) in enumerate(itertools.pairwise(starts)):
            shapes = self.plan.shapes(phase)
            for shape in shapes:
                batch = self._collated(shape, [self.loader.example(shape, 0)])
                nothing = described_whole(self._nothing(shape.task, batch), mesh)
                rows, step = described_rows(batch, size, mesh), jax.ShapeDtypeStruct((), jnp.int32)
                turns = self.config.tasks.count(shape.task) / len(self.config.tasks)
                alike = sum(other.task == shape.task for other in shapes)
                calls = (end - start) / self.config.steps * turns / alike
                arguments = (state, frozen, rows, nothing, key, step)
                name, task, flops = f"step, {shape}", {"task": shape.task}, self._flops(shape)
                roles = ("state", "parameters", "batch", "batch", "batch", "batch")
                found.append(Program(name, self._step, arguments, task, flops, roles, calls, self.config.accumulation))
        return found

    def _nothing(self, task: str, batch: dict[str, Any]) -> dict[str, Any]:
        """What stands for dropped captions, where one row serves all."""
        if "conditioning" in batch and "conditioner" in self.trained:
            raise ConfigError(
                "Stored conditioning leaves nothing to learn for the conditioner, which optimizer.trainable trains; take it "
                "out of data.stored, or train the transformer alone."
            )
        if not self.config.caption_dropout[task] or "empty_tokens" in batch:
            return {}
        with self.reading:
            tokens = self.reader.tokenize([""])
        if "conditioning" not in batch:
            return {"empty_tokens": tokens}
        if self.reader.reads_images and task == "edit":
            raise ConfigError("Stored conditioning has no dropped captions of edits; set caption_dropout.edit=0.")
        apply = jax.jit(self.bundle.conditioner.apply)
        return {"empty_conditioning": apply(self.bundle.params["conditioner"], tokens)}

    def _arguments(self, state: FlowState, shape: BatchShape, batch: dict[str, Any], step: int) -> tuple[Any, ...]:
        if shape.task not in self.nothing:
            self.nothing[shape.task] = jax.device_put(self._nothing(shape.task, batch), replicated(self.context.mesh))
        placed = shard_batch(batch, self.context.mesh, local=True)
        number = jax.device_put(np.int32(step))
        return state, self.frozen, placed, self.nothing[shape.task], self.context.key(step), number

    def _program(self, shape: BatchShape, arguments: tuple[Any, ...]) -> Hashable:
        """Asks for the training step for these arguments' shapes, and gives its key."""
        key = shape.task, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[2]))
        self.ahead.ask(key, f"the step for {shape}", self._step, *arguments, task=shape.task)
        return key

    def _ask_for_phase(self, state: FlowState, step: int) -> None:
        """Asks for what the rest of this step's phase and the next phase need, once."""
        phase = self.plan.phase(step)
        for later in range(max(phase, self.asked_phase + 1), min(phase + 2, len(self.plan.phases))):
            self.asked_phase = later
            for shape in self.plan.shapes(later):
                batch = self._collated(shape, [self.loader.example(shape, 0)] * len(self.loader.rows))
                self._program(shape, self._arguments(state, shape, batch, step))

    def step(self, state: FlowState, step: int) -> tuple[FlowState, dict[str, float]]:
        started = time.perf_counter()
        shape, batch = self._batch(step)
        waited = time.perf_counter() - started
        arguments = self._arguments(state, shape, batch, step)
        key = self._program(shape, arguments)
        if not self.config.pool:
            self._ask_for_phase(state, step)
        program = self.ahead[key]
        started = time.perf_counter()
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
        found: dict[str, list[np.ndarray]] = {}
        for step in range(config.batches * len(plan.tasks)):
            shape, batch = loader.batch(step)
            placed = shard_batch(batch, self.context.mesh, local=True)
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            found.setdefault(shape.task, []).append(jax.device_get(self._validate(params, placed, key)))
        metrics = {}
        for task, losses in found.items():
            by_level = np.mean(losses, axis=0)
            metrics[f"validation/{task}"] = float(by_level.mean())
            metrics |= {f"validation/{task}/sigma_{s:g}": float(x) for s, x in zip(config.sigmas, by_level)}
        return metrics

    def evaluate(self, state: FlowState, step: int) -> dict[str, Any]:
        del step
        params = merge_params(state.ema, self.frozen)
        result: dict[str, Any] = {"metrics": self.validate(params), "scores": {}, "images": {}}
        applied = self._applied(params)
        for evaluator in self.evaluators:
            for part, values in evaluator.run(applied, applied.get("lora")).items():
                result[part] |= values
        return result

    def close(self) -> None:
        self.ahead.close()

    def finish(self, state: FlowState) -> Any:
        """The averaged weights, a LoRA merged into them."""
        if self.scale is not None:
            own = merged(self.frozen["transformer"], state.ema["lora"], self.scale, self.context.precision.trained)
            return dataclasses.replace(self.bundle, params={**self.frozen, "transformer": own})
        params = merge_params(state.ema, self.frozen)
        groups = {name: params[name] for name in self.bundle.params}
        return dataclasses.replace(self.bundle, params=groups)

    def export(self, state: FlowState, folder: Path) -> None:
        """The LoRA, if there is one, in the file that diffusers' `load_lora_weights` reads."""
        if self.scale is not None:
            export_lora(folder, state.ema["lora"], self.config.lora.alpha, self.bundle.transformer.config)


def make_sources(config: ConfigDict, data: Any, seed: int) -> dict[str, ExampleSource]:
    """The examples of each task of a stage.

    Raises:
      ConfigError: when there is no task.
    """
    if not config.tasks:
        raise ConfigError("tasks is empty; name 't2i', 'edit' or both.")
    return {task: make_examples(data, seed, task) for task in sorted(set(config.tasks))}


def read_timesteps(config: ConfigDict, shift: float = 1.0) -> TimestepSampling:
    """The noise levels of a stage; `shift` is what they have where the stage names none.

    Raises:
      ValueError: when a field is out of range.
    """
    fields = config.timesteps.to_dict()
    return TimestepSampling(**{**fields, "shift": shift if fields["shift"] is None else fields["shift"]})


def make_plan(config: ConfigDict, sources: dict[str, ExampleSource], seed: int, final: bool = False) -> BatchPlan:
    """The order of a stage's batches; `final` is for the last resolution alone.

    Raises:
      ConfigError: when resolutions are not as described in the configuration, or larger than the data.
    """
    own = min(source.resolution for source in sources.values())
    if len({source.multiple for source in sources.values()}) > 1:
        raise ConfigError("The data of the tasks have edges of different multiples; prepare them with one --multiple.")
    phases = [(int(part * config.steps), resolution or own) for part, resolution in config.resolutions]
    if too_large := [resolution for _, resolution in phases if resolution > own]:
        raise ConfigError(f"resolutions asks for {too_large[0]} pixels but the data has {own}; prepare it larger.")
    phases = [(0, phases[-1][1])] if final else phases
    shares = {task: source.buckets for task, source in sources.items()}
    multiple = next(iter(sources.values())).multiple
    return BatchPlan(config.tasks, shares, config.batch_size, seed, phases, multiple)


def _concatenate(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of one structure as one. Leaves that are one object in every batch, as shared pictures are, stay one."""
    joined: dict[tuple[int, ...], np.ndarray] = {}

    def join(*leaves: np.ndarray) -> np.ndarray:
        key = tuple(map(id, leaves))
        if key not in joined:
            joined[key] = np.concatenate(leaves)
        return joined[key]

    return jax.tree.map(join, *parts)
