"""What a run trains and exports, whatever it is: the seam between training and the kinds of models."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from jax.sharding import Mesh

from unipic2_jax.core.registry import Registry
from unipic2_jax.weights.precision import Precision


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run says of the model that it starts from; the fields are those of `training.config.base_config`.

    Attributes:
      model: a kind of `MODELS`, or the name of sizes of a model that draws.
      init: folder of a model, or hub id; None: a new one.
      parts: networks of a new model that are read, by name.
      vlm: where the vision-language model is, if not in `init`.
      settings: fields that overrule the model's own.
      zero_projectors, seed: of a new model.
      attention: kernel of the transformer.
    """

    model: str
    init: str | None = None
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vlm: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zero_projectors: bool = True
    seed: int = 0
    attention: str = "auto"


class Model(Protocol):
    """Networks with their parameters, and everything else that their folder holds."""

    @property
    def params(self) -> dict[str, Any]:
        """Group -> tree. A leaf's path is its name in checkpoints; stages hand trained leaves on by it."""
        ...

    @classmethod
    def start(cls, start: Start, mesh: Mesh | None = None, precision: Precision | None = None) -> Self:
        """What a training starts from, on the mesh as `parallel.rules` says.

        Raises:
          ValueError, FileNotFoundError: one sentence about what `start` says.
        """
        ...

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields, most often `params`."""
        ...

    def save(
        self,
        folder: str | os.PathLike,
        dtype: Any = None,
        changed: Collection[str] | None = None,
        with_vlm: bool = True,
    ) -> Path:
        """Writes a folder that the original's own programs read.

        Args:
          dtype: of the files: float32, float16 or bfloat16; None keeps each parameter's own.
          changed: with `dtype` None: paths of leaves that are not as they were read. All others are copied from the files that
            they came from, bit for bit, and these get the dtypes that they have there.
          with_vlm: also write a vision-language model that no training changes.
        """
        ...


# Name in `config.model` -> class of models, for those that are no `models.bundle.Bundle`.
MODELS = Registry("kind of model")
