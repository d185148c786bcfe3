"""Batches of a plan, read and decoded ahead of their use by threads of grain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from unipic2_jax.data.batches import BatchPlan, BatchShape
from unipic2_jax.data.buckets import crop_to
from unipic2_jax.data.examples import Example, ExampleSource


class Loader:
    """Batch n of a plan for one process; going on from any step costs nothing, so a step number is the whole position.

    Processes take rows of every batch: however many there are, a step's examples are the same.

    Args:
      sources: for each task of the plan.
      collate: makes the host's batch of a process's examples; called by the threads.
      threads: that read and decode; 0 does it when a batch is asked for.
      ahead: batches that are ready before they are asked for.
      rows: of every batch, which this process takes; None: all.
    """

    def __init__(
        self,
        sources: Mapping[str, ExampleSource],
        plan: BatchPlan,
        collate: Callable[[BatchShape, Sequence[Example]], Any],
        *,
        threads: int = 16,
        ahead: int = 2,
        rows: Sequence[int] | None = None,
    ):
        self.plan, self.collate, self.threads, self.ahead = plan, collate, threads, ahead
        self.rows = range(plan.batch_size) if rows is None else [int(row) for row in rows]
        self.datasets = {
            (task, bucket): sources[task].dataset(bucket)
            for task, buckets in plan.buckets.items()
            for bucket in buckets
        }
        self.following, self.batches = -1, iter(())

    def example(self, shape: BatchShape, index: int) -> Example:
        """Example `index` of a bucket, its pictures brought to the shape's size."""
        example: Example = self.datasets[shape.task, shape.bucket][index]
        height, width = shape.size
        fit = lambda pixels: np.asarray(crop_to(Image.fromarray(pixels), height, width))
        image = None if example.image is None else fit(example.image)
        return Example(image, example.prompt, tuple(map(fit, example.references)), example.arrays)

    def batch(self, step: int) -> tuple[BatchShape, Any]:
        """The shape and the collated examples of a step."""
        if step != self.following:
            self.batches = self._batches(step)
        self.following = step + 1
        return next(self.batches)

    def _batches(self, step: int) -> Iterator[tuple[BatchShape, Any]]:
        size = len(self.rows)
        numbered = grain.MapDataset.range(step * size, sys.maxsize).map(self._numbered)
        options = grain.ReadOptions(self.threads, size * self.ahead if self.threads else 0)
        batches = numbered.to_iter_dataset(options).batch(size, batch_fn=self._collated)
        if self.threads:
            batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self.ahead)
        return iter(batches)

    def _numbered(self, number: int) -> tuple[BatchShape, Example]:
        step, place = divmod(number, len(self.rows))
        found = self.plan.place(step)
        return found.shape, self.example(found.shape, found.first + self.rows[place])

    def _collated(self, numbered: Sequence[tuple[BatchShape, Example]]) -> tuple[BatchShape, Any]:
        shape = numbered[0][0]
        return shape, self.collate(shape, [example for _, example in numbered])
