"""Examples as the arrays of a batch: pictures and the prompts' tokens, or what is stored of either."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
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
    that: each thread at work has a copy of the conditioner, so that none waits for another.

    Args:
      reader: of prompts.
      dropout: the part of the captions that is left out in training, by task.
    """

    def __init__(self, reader: Reader, dropout: Mapping[str, float]):
        # The first copy is only copied again: what tokenises meanwhile would change under the copying.
        self.reader, self.dropout, self._copying = copy.deepcopy(reader), dropout, threading.Lock()
        self._free: queue.SimpleQueue[Reader] = queue.SimpleQueue()

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
        with self._own() as reader:
            if not reader.reads_images:
                return {**batch, "tokens": reader.tokenize(prompts)}
            if not self.dropout[shape.task]:
                return {**batch, "tokens": reader.tokenize(prompts, references)}
            given, empty = _with_empty(reader, prompts, references)
        return {**batch, "tokens": given, "empty_tokens": empty}

    def no_prompt(self) -> Any:
        """Tokens of an empty prompt without pictures: one row."""
        with self._own() as reader:
            return reader.tokenize([""])

    @contextlib.contextmanager
    def _own(self) -> Iterator[Reader]:
        """A copy of the conditioner that no other thread uses meanwhile."""
        try:
            reader = self._free.get_nowait()
        except queue.Empty:
            with self._copying:
                reader = copy.deepcopy(self.reader)
        try:
            yield reader
        finally:
            self._free.put(reader)


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
