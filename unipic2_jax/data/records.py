"""Pictures and texts as people keep them, before preparation: numbered records of files, folders and datasets.

A source of records is what grain calls a random-access data source, so `grain.MapDataset.source` takes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from unipic2_jax.data.kinds import make_kind

# Kind -> 'module:class'; a class takes (**options) and is a RecordSource.
RECORDS: dict[str, Any] = {
    "jsonl": "unipic2_jax.data.readers.jsonl:JSONLRecords",
    "folder": "unipic2_jax.data.readers.folder:FolderRecords",
    "webdataset": "unipic2_jax.data.readers.webdataset:WebDatasetRecords",
    "parquet": "unipic2_jax.data.readers.parquet:ParquetRecords",
    "tfds": "unipic2_jax.data.readers.tfds:TFDSRecords",
    "prepared": "unipic2_jax.data.readers.prepared:PreparedRecords",
    "shapes": "unipic2_jax.data.readers.shapes:ShapesRecords",
}

# A picture that is not decoded yet: a file, a file's bytes, or pixels uint8 [H, W, 3].
Encoded = Path | bytes | np.ndarray


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is a short slug to count by ('not-json'), the message one sentence."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # both arguments survive the way back from a worker process
        return BadRecord, (self.reason, str(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A picture with the text it answers, as found.

    Attributes:
      image: the picture to learn.
      prompt: caption or instruction.
      references: the pictures that were edited; none for text-to-image.
      name: where it came from, for messages: 'line 3 of train.jsonl'.
    """

    image: Encoded
    prompt: str
    references: tuple[Encoded, ...] = ()
    name: str = ""


class RecordSource(Protocol):
    """Numbered records. They are read by several threads and by copies of the source in other processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record number `index`. Raises BadRecord when it cannot be used; anything else it raises is a bug."""
        ...


def make_records(config: Mapping[str, Any]) -> RecordSource:
    """The source that `config` describes: its `kind`, and options of that kind, mostly `path`.

    Raises:
      FileNotFoundError: what it names does not exist.
      ValueError: for an unknown kind or option, or a source without records.
    """
    return make_kind(RECORDS, "kind of records", config)
