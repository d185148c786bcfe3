"""Edits with a judge's marks, as `pipelines.label_edits` writes them: numbered examples."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from unipic2_jax.core.addresses import local
from unipic2_jax.data.prepared import PreparedBucket, PreparedExample, PreparedIndex


class LabelledEdits:
    """Prepared folders, named with commas between them, whose examples have a reference and the marks `targets`.

    Raises:
      FileNotFoundError, ValueError: at construction, when a folder is not complete, or is of something else.
    """

    def __init__(self, folders: str | os.PathLike, targets: Sequence[str]):
        self._parts = [part for folder in os.fspath(folders).split(",") for part in self._open(folder, targets)]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])

    @staticmethod
    def _open(folder: str, targets: Sequence[str]) -> list[PreparedBucket]:
        folder = local(folder)
        index = PreparedIndex.read(folder)
        if any(bucket.task != "edit" for bucket in index.buckets()):
            raise ValueError(
                f"{folder} holds examples without a source picture; give edits that launch.score_edits scored."
            )
        if missing := [name for name in targets if name not in index.arrays]:
            has = ", ".join(index.arrays) or "none"
            raise ValueError(
                f"The edits in {folder} have no mark '{missing[0]}' (they have {has}); use one that is there."
            )
        return [PreparedBucket(folder, index, bucket) for bucket in sorted(index.buckets())]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> PreparedExample:
        """Example number `index`: pictures as encoded files, marks in `arrays`, one number each."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]
