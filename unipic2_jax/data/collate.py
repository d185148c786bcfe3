"""Examples as the arrays of a batch: pictures and the prompts' tokens, or what is stored of either."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from unipic2_jax.data.batches import BatchShape
from unipic2_jax.data.examples import Example

# What the VAE makes of pictures: names of arrays end with these, and those of pictures that were edited begin so.
MOMENTS = ("mean", "logvar")
REFERENCE = "reference_"


class Reader(Protocol):
    """What collating asks of a conditioner (`models.conditioner.Conditioner`)."""

    @property
    def reads_images(self) -> bool: ...

    @property
    def latent_references(self) -> bool: ...

    def tokenize(self, prompts: Sequence[str], images: Sequence[Sequence[Any]] | None = None) -> Any: ...


class Collate:
    """Makes the host's batch of examples of one shape; a pure function of them.

    Threads of a loader call it while the training's own thread does, and evaluators tokenise beside them. Tokenizers do not bear
    that: here is a copy of the conditioner, used by one thread at a time.

    Args:
      reader: of prompts.
      dropout: the part of the captions that is left out in training, by task.
    """

    def __init__(self, reader: Reader, dropout: Mapping[str, float]):
        self.reader, self.dropout, self._reading = copy.deepcopy(reader), dropout, threading.Lock()

    def __call__(self, shape: BatchShape, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch of B examples, arrays [B, ...].

        Returns:
          'images' uint8 and, where there are references that the transformer attends to, 'reference_images' [B, R, H, W, 3], or the
          VAE's moments of either; and 'tokens', with 'empty_tokens' where no prompt needs a row for each example, or 'conditioning'.
        """
        batch = _pictures(examples, self.reader.latent_references)
        if "context" in examples[0].arrays:
            return {**batch, "conditioning": (_stored("context", examples), _stored("pooled", examples))}
        prompts, references = [e.prompt for e in examples], [e.references for e in examples]
        with self._reading:
            if not self.reader.reads_images:
                return {**batch, "tokens": self.reader.tokenize(prompts)}
            if not self.dropout[shape.task]:
                return {**batch, "tokens": self.reader.tokenize(prompts, references)}
            given, empty = _with_empty(self.reader, prompts, references)
        return {**batch, "tokens": given, "empty_tokens": empty}

    def no_prompt(self) -> Any:
        """Tokens of an empty prompt without pictures: one row."""
        with self._reading:
            return self.reader.tokenize([""])


def concatenate(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches of one structure as one. Leaves that are one object in every batch, as shared pictures are, stay one."""
    joined: dict[tuple[int, ...], np.ndarray] = {}

    def join(*leaves: np.ndarray) -> np.ndarray:
        key = tuple(map(id, leaves))
        if key not in joined:
            joined[key] = np.concatenate(leaves)
        return joined[key]

    return jax.tree.map(join, *parts)


def _pictures(examples: Sequence[Example], with_references: bool) -> dict[str, np.ndarray]:
    """Pictures, or the moments that are stored instead of them."""
    first = examples[0]
    if first.image is None:
        stored = [name for name in first.arrays if name.endswith(MOMENTS)]
        return {name: _stored(name, examples) for name in stored if with_references or not name.startswith(REFERENCE)}
    batch = {"images": np.stack([example.image for example in examples])}
    if first.references and with_references:
        batch[f"{REFERENCE}images"] = np.stack([np.stack(example.references) for example in examples])
    return batch


def _stored(name: str, examples: Sequence[Example]) -> np.ndarray:
    return np.stack([example.arrays[name] for example in examples])


def _with_empty(reader: Reader, prompts: list[str], images: list[Any]) -> tuple[Any, Any]:
    """Tokens of the prompts with their images, and of no prompts with the same images."""
    count = len(prompts)
    both = reader.tokenize([*prompts, *[""] * count], images * 2)
    given, empty = (jax.tree.map(lambda x, part=part: x[part], both) for part in (slice(count), slice(count, None)))
    # The pictures, by far the largest part, are the same.
    return given, jax.tree.map(lambda x, y: x if np.array_equal(x, y) else y, given, empty)
