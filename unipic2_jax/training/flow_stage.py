"""Flow-matching training of the transformer, alone or with its conditioner (paper section 3.1)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from unipic2_jax.data.examples import Example, make_examples
from unipic2_jax.flow.timesteps import TimestepSampling
from unipic2_jax.parallel.mesh import replicated, shard_batch
from unipic2_jax.pipelines.sampling import encode_images, from_uint8
from unipic2_jax.rl.ema import ema_update
from unipic2_jax.training.config import ConfigError, stage_fields
from unipic2_jax.training.evaluator import Evaluator, check_evaluation, read_evaluation
from unipic2_jax.training.flow import flow_loss
from unipic2_jax.training.optimizer import make_optimizer, merge_params, split_params
from unipic2_jax.training.stage import Stage, StageContext

ENCODE_BATCH = 256


class FlowState(NamedTuple):
    """What changes."""

    trained: Any
    opt_state: Any
    ema: Any


class FlowStage(Stage):
    """Trains on `tasks` in turn, one task a batch, as the paper alternates text-to-image and editing.

    With `pool` > 0 the first so many examples of each task are encoded once and drawn from at random; with 0 every step
    encodes examples never seen before. What is evaluated and kept is the moving average of the weights.
    """

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The paper's optimizer; timestep sampling and caption dropout as in its lineage."""
        config = stage_fields()
        config.kind = "flow"
        config.data = {}  # see data.examples.make_examples
        config.tasks = ("t2i", "edit")
        config.pool = 0
        config.batch_size = 128
        config.caption_dropout = ConfigDict({"t2i": 0.1, "edit": 0.0})
        config.timesteps = ConfigDict(dataclasses.asdict(TimestepSampling()))
        config.weighting = "none"
        config.ema_decay = 0.999
        config.evaluations = {}
        config.optimizer.update({"lr": 4e-5, "schedule": "cosine", "trainable": "^transformer/"})
        return config

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Builds everything that the configuration describes and that costs nothing."""
        if not config.tasks:
            raise ConfigError("tasks is empty; name 't2i', 'edit' or both.")
        for task in config.tasks:
            make_examples(config.data, 0, task)
            if task not in config.caption_dropout:
                raise ConfigError(f"caption_dropout has no rate for the task '{task}'; add one.")
        TimestepSampling(**config.timesteps)
        make_optimizer(config.optimizer, config.steps)
        shard_batch(np.zeros(config.batch_size), mesh)
        for name, fields in config.evaluations.items():
            check_evaluation(name, fields)

    def __init__(self, config: ConfigDict, bundle: Any, context: StageContext):
        super().__init__(config, bundle, context)
        self.examples = {task: make_examples(config.data, context.data_seed(), task) for task in config.tasks}
        self.sampling = TimestepSampling(**config.timesteps)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self.trained, self.frozen = split_params(bundle.params, config.optimizer.trainable)
        self.empty = None if bundle.conditioner.reads_images else bundle.conditioner.tokenize([""])
        self._encode = jax.jit(lambda params, images: encode_images(bundle.vae, params, from_uint8(images)))
        self._step = jax.jit(self._train_step, static_argnames="task")
        self.evaluators = [
            Evaluator(name, read_evaluation(name, fields), bundle, context.mesh)
            for name, fields in config.evaluations.items()
        ]
        self.pools: dict[str, dict[str, Any]] = {}

    def _latents(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> normalised latents (modes) on the host."""
        encoded = self._encode(self.bundle.params["vae"], shard_batch(images, self.context.mesh))
        return np.asarray(encoded)

    def _tokens(self, examples: list[Example]) -> dict[str, Any]:
        """Tokens of the prompts, and where they are read together with images also those of no prompt."""
        conditioner, prompts = self.bundle.conditioner, [example.prompt for example in examples]
        if not conditioner.reads_images:
            return {"tokens": conditioner.tokenize(prompts)}
        count, images = len(examples), [example.references for example in examples]
        both = conditioner.tokenize([*prompts, *[""] * count], images * 2)
        given, empty = (jax.tree.map(lambda x, part=part: x[part], both) for part in (slice(count), slice(count, None)))
        # The pictures, by far the largest part, are the same.
        shared = jax.tree.map(lambda x, y: x if np.array_equal(x, y) else y, given, empty)
        return {"tokens": given, "empty_tokens": shared}

    def _encoded(self, examples: list[Example]) -> dict[str, Any]:
        """A batch as `flow_loss` wants it, but for an empty caption that all share."""
        batch = {"latents": self._latents(np.stack([example.image for example in examples])), **self._tokens(examples)}
        if count := len(examples[0].references):
            references = np.stack([picture for example in examples for picture in example.references])
            latents = self._latents(references)
            batch["references"] = latents.reshape(len(examples), count, *latents.shape[1:])
        return batch

    def _pool(self, task: str) -> dict[str, Any]:
        """The first `pool` examples of a task, encoded; made when a task is first trained on."""
        if task not in self.pools:
            starts = range(0, self.config.pool, ENCODE_BATCH)
            parts = [
                self._encoded([self.examples[task].example(i) for i in range(start, start + ENCODE_BATCH)])
                for start in tqdm(starts, desc=f"encoding {task} examples", disable=None)
            ]
            self.pools[task] = _concatenate(parts)
        return self.pools[task]

    def _batch(self, task: str, step: int) -> dict[str, Any]:
        size = self.config.batch_size
        if not self.config.pool:
            turn = step // len(self.config.tasks)
            return self._encoded([self.examples[task].example(turn * size + i) for i in range(size)])
        pool = self._pool(task)
        index = np.random.default_rng([self.context.data_seed(), step]).integers(self.config.pool, size=size)
        return jax.tree.map(lambda leaf: leaf[index], pool)

    def _train_step(
        self, state: FlowState, frozen: Any, batch: Any, empty: Any, key: jax.Array, step: jax.Array, task: str
    ) -> tuple[FlowState, dict[str, jax.Array]]:
        def loss_fn(trained):
            return flow_loss(
                self.bundle.transformer,
                self.bundle.conditioner,
                merge_params(trained, frozen),
                {"empty_tokens": empty, **batch},
                key,
                sampling=self.sampling,
                weighting=self.config.weighting,
                caption_dropout=self.config.caption_dropout[task],
                num_train_timesteps=self.bundle.scheduler.num_train_timesteps,
            )

        (loss, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        changes, opt_state = self.optimizer.update(gradients, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, changes)
        ema = ema_update(state.ema, trained, step, self.config.ema_decay, 1)
        metrics = {"loss": loss, **parts, "gradient_norm": optax.global_norm(gradients)}
        return FlowState(trained, opt_state, ema), metrics

    def init(self) -> FlowState:
        ema = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), self.trained)
        return jax.device_put(
            FlowState(self.trained, self.optimizer.init(self.trained), ema), replicated(self.context.mesh)
        )

    def step(self, state: FlowState, step: int) -> tuple[FlowState, dict[str, float]]:
        task = self.config.tasks[step % len(self.config.tasks)]
        batch = shard_batch(self._batch(task, step), self.context.mesh)
        state, metrics = self._step(state, self.frozen, batch, self.empty, self.context.key(step), step, task=task)
        metrics = jax.device_get(metrics)
        return state, {**metrics, f"loss_{task}": metrics["loss"]}

    def evaluate(self, state: FlowState, step: int) -> dict[str, Any]:
        del step
        result: dict[str, Any] = {"metrics": {}, "scores": {}, "images": {}}
        params = merge_params(state.ema, self.frozen)
        for evaluator in self.evaluators:
            for part, values in evaluator.run(params).items():
                result[part] |= values
        return result

    def finish(self, state: FlowState) -> Any:
        """The averaged weights in the dtypes they had."""
        kept = jax.tree.map(lambda average, leaf: average.astype(leaf.dtype), state.ema, self.trained)
        params = merge_params(kept, self.frozen)
        groups = {name: params[name] for name in self.bundle.params}
        return dataclasses.replace(self.bundle, params=groups)


def _concatenate(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of one structure as one. Leaves that are one object in every batch, as shared pictures are, stay one."""
    joined: dict[tuple[int, ...], np.ndarray] = {}

    def join(*leaves: np.ndarray) -> np.ndarray:
        key = tuple(map(id, leaves))
        if key not in joined:
            joined[key] = np.concatenate(leaves)
        return joined[key]

    return jax.tree.map(join, *parts)
