"""What flow matching and autoencoders train on: numbered examples, so that a position in the data is one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from unipic2_jax.data.kinds import make_kind

# Kind -> 'module:class'; a class takes (seed, task, **options) and is an ExampleSource.
EXAMPLES: dict[str, Any] = {
    "shapes": "unipic2_jax.data.shapes.sources:ShapesExamples",
}
TASKS = ("t2i", "edit", "image")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A picture with the text it answers.

    Attributes:
      image: uint8 [H, W, 3], the picture to learn.
      prompt: caption or instruction.
      references: uint8 [H, W, 3] each, the pictures that were edited.
    """

    image: np.ndarray
    prompt: str = ""
    references: tuple[np.ndarray, ...] = ()


class ExampleSource(Protocol):
    """An endless sequence; example `index` is always the same."""

    def example(self, index: int) -> Example: ...


def make_examples(config: Mapping[str, Any], seed: int, task: str) -> ExampleSource:
    """The source that `config` describes (its `kind`, and that kind's options), for one of `TASKS`.

    Raises:
      ValueError: for an unknown kind, task or option.
    """
    if task not in TASKS:
        raise ValueError(f"The task '{task}' does not exist; choose one of {', '.join(TASKS)}.")
    return make_kind(EXAMPLES, "data source", config, seed=seed, task=task)
