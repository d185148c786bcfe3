"""The shapes world as records."""

from __future__ import annotations

from collections.abc import Mapping

from unipic2_jax.data.records import RECORDS, Record
from unipic2_jax.shapes.sources import TASKS, ShapesExamples


@RECORDS.register("shapes")
class ShapesRecords:
    """The first `count` examples of the endless shapes world (`shapes.sources.ShapesExamples`), from its training split.

    Attributes:
      task: 't2i' or 'edit'.
      weights: how often a tag or edit type is drawn, relative to 1 for those that are not named.

    Raises:
      ValueError: for an unknown task or weight, or no examples.
    """

    def __init__(self, task: str, count: int, seed: int = 0, weights: Mapping[str, float] | None = None):
        if task not in TASKS:
            raise ValueError(f"The shapes world has no records for the task '{task}'; use one of {', '.join(TASKS)}.")
        if count < 1:
            raise ValueError(f"{count} examples of the shapes world are none; give a count of at least 1.")
        self.task, self.count, self._examples = task, count, ShapesExamples(seed, task, weights)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        example = self._examples.example(index)
        return Record(example.image, example.prompt, example.references, f"shapes {self.task} {index}")
