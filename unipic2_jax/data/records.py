"""Pictures and texts as people keep them, before preparation: numbered records of files, folders and datasets.

A source of records is what grain calls a random-access data source, so `grain.MapDataset.source` takes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from unipic2_jax.core.registry import Registry
from unipic2_jax.pictures.decode import Encoded

# Kinds. A class takes (**options) and is a RecordSource.
RECORDS = Registry("kind of records")


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
    return RECORDS.make(config)
