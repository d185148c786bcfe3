"""The host's side of a flow stage: which examples make up which batch, a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.batches import BatchPlan, BatchShape
from unipic2_jax.data.collate import concatenate
from unipic2_jax.data.examples import ExampleSource, make_examples
from unipic2_jax.data.loader import Loader

ENCODE_BATCH = 256
PICTURES = ("images", "reference_images")


def make_sources(config: ConfigDict, data: Any, seed: int) -> dict[str, ExampleSource]:
    """The examples of each task of a stage.

    Raises:
      ConfigError: when there is no task.
    """
    if not config.tasks:
        raise ConfigError("tasks is empty; name 't2i', 'edit' or both.")
    return {task: make_examples(data, seed, task) for task in sorted(set(config.tasks))}


def make_plan(config: ConfigDict, sources: dict[str, ExampleSource], seed: int, final: bool = False) -> BatchPlan:
    """The order of a stage's batches; `final` is for the last resolution alone.

    Raises:
      ConfigError: when resolutions are not as described in the configuration, or larger than the data.
    """
    smallest = min(source.resolution for source in sources.values())
    if len({source.multiple for source in sources.values()}) > 1:
        raise ConfigError("The data of the tasks have edges of different multiples; prepare them with one --multiple.")
    phases = [(int(part * config.steps), resolution or smallest) for part, resolution in config.resolutions]
    if too_large := [resolution for _, resolution in phases if resolution > smallest]:
        raise ConfigError(f"resolutions asks for {too_large[0]} pixels but the data has {smallest}; prepare it larger.")
    phases = [(0, phases[-1][1])] if final else phases
    shares = {task: source.buckets for task, source in sources.items()}
    multiple = next(iter(sources.values())).multiple
    return BatchPlan(config.tasks, shares, config.batch_size, seed, phases, multiple)


class Pool:
    """The first examples of each task with their pictures encoded, which batches are drawn from at random.

    What it keeps is a cache: examples are numbered and the VAE is frozen, so that it is the same when it is made again.

    Args:
      loader: of examples, for the rows that this process takes of a batch.
      seed: of the stage's data.
      size: examples of each task.
      encode: the VAE's moments, on the host, of a batch's 'images' and 'reference_images'.

    Raises:
      ConfigError: when a task has examples of several shapes.
    """

    def __init__(self, loader: Loader, seed: int, size: int, encode: Callable[[dict[str, Any]], dict[str, Any]]):
        self.loader, self.plan, self.seed, self.size, self.encode = loader, loader.plan, seed, size, encode
        shapes = {shape for phase in range(len(self.plan.phases)) for shape in self.plan.shapes(phase)}
        if len(shapes) > len(set(self.plan.tasks)):
            raise ConfigError(f"A pool needs one shape for each task, and here are {len(shapes)} in all; set pool=0.")
        self._encoded: dict[BatchShape, dict[str, Any]] = {}  # the cache

    def batch(self, step: int) -> tuple[BatchShape, dict[str, Any]]:
        """The shape of a step's batch, and its rows of this process."""
        shape = self.plan.place(step).shape
        rng = np.random.default_rng([self.seed, step])
        index = rng.integers(self.size, size=self.plan.batch_size)[self.loader.rows]
        return shape, jax.tree.map(lambda leaf: leaf[index], self._examples(shape))

    def _examples(self, shape: BatchShape) -> dict[str, Any]:
        """All of a task's examples, encoded when it is first trained on."""
        if shape not in self._encoded:
            starts = range(0, self.size, ENCODE_BATCH)
            bar = tqdm(starts, desc=f"encoding {shape.task} examples", disable=None)
            self._encoded[shape] = concatenate([self._part(shape, start) for start in bar])
        return self._encoded[shape]

    def _part(self, shape: BatchShape, start: int) -> dict[str, Any]:
        examples = [self.loader.example(shape, index) for index in range(start, start + ENCODE_BATCH)]
        batch = self.loader.collate(shape, examples)
        pictures = {name: batch.pop(name) for name in PICTURES if name in batch}
        return {**batch, **self.encode(pictures)}
