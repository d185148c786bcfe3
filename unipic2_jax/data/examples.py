"""What flow matching and autoencoders train on: endless sequences of examples, one for each bucket.

Example n of a bucket is always the same, so a position in the data is one number. grain does the shuffling and mixing.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import grain
import numpy as np

from unipic2_jax.core.addresses import local
from unipic2_jax.core.registry import Registry
from unipic2_jax.data.buckets import Bucket
from unipic2_jax.data.prepared import PreparedBucket, PreparedExample, PreparedIndex
from unipic2_jax.pictures.decode import decode

# Kinds. A class takes (seed, task, **options) and is an ExampleSource.
EXAMPLES = Registry("data source")
TASKS = ("t2i", "edit", "image")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A picture with the text it answers.

    Attributes:
      image: uint8 [H, W, 3], the picture to learn; None where its latents are stored.
      prompt: caption or instruction.
      references: uint8 [H, W, 3] each, the pictures that were edited; empty where everything made of them is stored.
      arrays: what was computed before training; see data.prepared.
    """

    image: np.ndarray | None
    prompt: str = ""
    references: tuple[np.ndarray, ...] = ()
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class ExampleSource(Protocol):
    """Examples of one task.

    Attributes:
      resolution: pixels of a square picture's edge; no picture is smaller than its bucket at this resolution.
      multiple: pixels that the edges of all buckets are multiples of.
      buckets: which there are, and the share of each among the examples (of any scale).
    """

    resolution: int
    multiple: int
    buckets: Mapping[Bucket, float]

    def dataset(self, bucket: Bucket) -> grain.MapDataset:
        """The bucket's endless sequence of Examples."""
        ...


def make_examples(config: Mapping[str, Any], seed: int, task: str) -> ExampleSource:
    """The source that `config` describes (its `kind`, and that kind's options), for one of `TASKS`.

    Raises:
      FileNotFoundError: it names something that does not exist.
      ValueError: for an unknown kind, task or option, or when there are no examples of the task.
    """
    if task not in TASKS:
        raise ValueError(f"The task '{task}' does not exist; choose one of {', '.join(TASKS)}.")
    return EXAMPLES.make(config, seed=seed, task=task)


class EndlessExamples:
    """Base of sources that make example number n when it is asked for; all are square."""

    def __init__(self, task: str, resolution: int, multiple: int):
        self.resolution, self.multiple = resolution, multiple
        self.buckets = {Bucket("1:1", int(task == "edit")): 1.0}

    def example(self, index: int) -> Example:
        """Example number `index`."""
        raise NotImplementedError

    def dataset(self, bucket: Bucket) -> grain.MapDataset:
        """All examples; there is one bucket."""
        del bucket
        return grain.MapDataset.range(sys.maxsize).map(self.example)


@EXAMPLES.register("prepared")
class PreparedExamples:
    """A folder that `launch.prepare_data` wrote, in a new order each time it has been gone through.

    Attributes:
      stored: what is read instead of being computed in training: 'latents', 'conditioning'.
    """

    # What the names of the arrays of each kind of stored results end with.
    ARRAYS: ClassVar[dict[str, tuple[str, ...]]] = {
        "latents": ("mean", "logvar"),
        "conditioning": ("context", "pooled"),
    }

    def __init__(self, path: str, seed: int = 0, task: str = "t2i", stored: tuple[str, ...] = ()):
        if not path:
            raise ValueError("There is prepared data without a path; give the folder that launch.prepare_data wrote.")
        self.path, self.seed, self.stored = local(path), seed, tuple(stored)
        self.index = PreparedIndex.read(self.path)
        self.resolution, self.multiple = self.index.resolution, self.index.multiple
        wanted = "edit" if task == "edit" else "t2i"
        self.buckets = {b: float(count) for b, count in self.index.buckets().items() if b.task == wanted}
        if not self.buckets:
            raise ValueError(
                f"The prepared data in {path} has no examples for the task '{task}'; name other data for it."
            )
        for kind in self.stored:
            if kind not in self.ARRAYS:
                raise ValueError(f"stored names '{kind}'; use some of {', '.join(self.ARRAYS)}.")
            if set(self.ARRAYS[kind]) - set(self.index.arrays):
                raise ValueError(f"The prepared data in {path} has no stored {kind}; prepare it with --store={kind}.")

    def dataset(self, bucket: Bucket) -> grain.MapDataset:
        """The bucket's examples, shuffled, over and over."""
        source = PreparedBucket(self.path, self.index, bucket)
        return grain.MapDataset.source(source).seed(self.seed).shuffle().repeat().map(self._decoded)

    def _decoded(self, stored: PreparedExample) -> Example:
        arrays = {n: stored.arrays[n] for kind in self.stored for n in stored.arrays if n.endswith(self.ARRAYS[kind])}
        pixels = lambda data: np.asarray(decode(data))
        # Pictures that nothing would be made of are not decoded.
        image = None if "latents" in self.stored else pixels(stored.image)
        needed = set(self.ARRAYS) - set(self.stored)
        references = tuple(map(pixels, stored.references)) if needed else ()
        return Example(image, stored.prompt, references, arrays)


@EXAMPLES.register("mixture")
class MixtureExamples:
    """Several sources, of which each gives its part of every bucket.

    Attributes:
      sources: name -> {'kind', 'weight', options}; a source without examples of the task is left out. Weights are shares of
        all examples of the task, whatever the sizes of the sources.
    """

    def __init__(self, sources: Mapping[str, Mapping[str, Any]], seed: int = 0, task: str = "t2i"):
        if not sources:
            raise ValueError("A mixture has no sources; name at least one under 'sources'.")
        self.parts: list[tuple[float, ExampleSource]] = []
        for number, (name, options) in enumerate(sources.items()):
            options = dict(options)
            weight = float(options.pop("weight", 1.0))
            tasks = options.pop("tasks", TASKS)
            if not weight > 0:
                raise ValueError(
                    f"The source '{name}' of a mixture has the weight {weight:g}; give more than 0, or leave it out."
                )
            if task in tasks:
                self.parts.append((weight, make_examples(options, seed + 7919 * number, task)))
        if not self.parts:
            raise ValueError(f"No source of the mixture is for the task '{task}'; add one, or leave the task out.")
        if len({source.multiple for _, source in self.parts}) > 1:
            raise ValueError(
                "The sources of a mixture have edges of different multiples; prepare them with one --multiple."
            )
        self.multiple = self.parts[0][1].multiple
        self.resolution = min(source.resolution for _, source in self.parts)
        self.buckets: dict[Bucket, float] = {}
        for weight, source in self.parts:
            for bucket in source.buckets:
                self.buckets[bucket] = self.buckets.get(bucket, 0.0) + weight * _share(source, bucket)

    def dataset(self, bucket: Bucket) -> grain.MapDataset:
        """The sources' sequences of this bucket, interleaved in proportion to what each adds to it."""
        shares = [
            (weight * _share(source, bucket), source) for weight, source in self.parts if bucket in source.buckets
        ]
        return grain.MapDataset.mix([source.dataset(bucket) for _, source in shares], [weight for weight, _ in shares])


def _share(source: ExampleSource, bucket: Bucket) -> float:
    return source.buckets[bucket] / sum(source.buckets.values())
