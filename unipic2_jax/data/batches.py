"""Which examples make up which batch: a function of the seed and the step, the same on every process."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from unipic2_jax.data.buckets import Bucket, bucket_size

BLOCK = 4096  # draws of buckets that are made at a time


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """What decides a batch's shape, and so which compiled program takes it.

    Attributes:
      resolution, multiple: see `buckets.bucket_size`.
    """

    task: str
    bucket: Bucket
    resolution: int
    multiple: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return bucket_size(self.bucket.aspect, self.resolution, self.multiple)

    def __str__(self) -> str:
        height, width = self.size
        with_references = f" + {self.bucket.references} reference(s)" if self.bucket.references else ""
        return f"{self.task} {width}x{height}{with_references}"


@dataclasses.dataclass(frozen=True)
class BatchPlace:
    """A batch: its shape, and the number of its first example in the endless sequence of its bucket."""

    shape: BatchShape
    first: int


class BatchPlan:
    """Tasks in turn, a bucket drawn by its share for each batch, and through every bucket's examples in order.

    Args:
      tasks: the turn; ('t2i', 't2i', 'edit') is two batches of text-to-image for one of edits.
      shares: for each task, how often each bucket comes (of any scale).
      phases: (first step, resolution), ascending from step 0.

    Raises:
      ValueError: when phases are not like that.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        shares: Mapping[str, Mapping[Bucket, float]],
        batch_size: int,
        seed: int,
        phases: Sequence[tuple[int, int]],
        multiple: int,
    ):
        first = [step for step, _ in phases]
        if not first or first[0] != 0 or sorted(set(first)) != first:
            raise ValueError(f"Phases begin at the steps {first}; they must ascend from 0.")
        self.tasks, self.batch_size, self.seed = tuple(tasks), batch_size, seed
        self.phases, self.multiple = tuple(phases), multiple
        # Sorted, so that the draw does not depend on the order in which files were listed.
        self.buckets = {task: sorted(shares[task]) for task in set(tasks)}
        self.shares = {task: np.array([shares[task][b] for b in buckets]) for task, buckets in self.buckets.items()}
        self.drawn: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {task: [] for task in self.buckets}
        self.lock = threading.Lock()

    def phase(self, step: int) -> int:
        """Which of the phases a step is in."""
        return max(i for i, (first, _) in enumerate(self.phases) if first <= step)

    def shapes(self, phase: int) -> list[BatchShape]:
        """The shapes that a phase needs."""
        resolution = self.phases[phase][1]
        return [
            BatchShape(task, bucket, resolution, self.multiple)
            for task in sorted(self.buckets)
            for bucket in self.buckets[task]
        ]

    def place(self, step: int) -> BatchPlace:
        """The batch of a step."""
        rounds, rest = divmod(step, len(self.tasks))
        task = self.tasks[rest]
        turn = rounds * self.tasks.count(task) + self.tasks[:rest].count(task)
        block, place = divmod(turn, BLOCK)
        draws, before = self._block(task, block)
        chosen = draws[place]
        earlier = before[chosen] + np.count_nonzero(draws[:place] == chosen)
        shape = BatchShape(task, self.buckets[task][chosen], self.phases[self.phase(step)][1], self.multiple)
        return BatchPlace(shape, int(earlier) * self.batch_size)

    def _block(self, task: str, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(buckets drawn in this block of turns, how often each was drawn before it)."""
        drawn, share = self.drawn[task], self.shares[task]
        with self.lock:
            while len(drawn) <= block:
                rng = np.random.default_rng([self.seed, sorted(self.buckets).index(task), len(drawn)])
                draws = rng.choice(len(share), size=BLOCK, p=share / share.sum())
                before = np.zeros(len(share), np.int64)
                if drawn:
                    before = drawn[-1][1] + np.bincount(drawn[-1][0], minlength=len(share))
                drawn.append((draws, before))
            return drawn[block]
