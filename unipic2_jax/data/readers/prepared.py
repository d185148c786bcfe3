"""Prepared data as records again, so that it can be prepared for another resolution."""

from __future__ import annotations

import os
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource

from unipic2_jax.core.addresses import local
from unipic2_jax.data.prepared import PreparedIndex, unpack
from unipic2_jax.data.records import RECORDS, Record
from unipic2_jax.pictures.decode import BadRecord


@RECORDS.register("prepared")
class PreparedRecords:
    """What `launch.prepare_data` wrote to a folder: its pictures and prompts, but no latents and the like.

    Raises:
      FileNotFoundError: there is no such folder, or a shard is missing.
      ValueError: its index or a shard is damaged, or there is nothing in it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(local(path)).expanduser()
        files = [str(self.path / shard.file) for shard in PreparedIndex.read(self.path).shards]
        if not files:
            raise ValueError(f"There is no example in {path}; prepare its source again.")
        try:
            self._source = ArrayRecordDataSource(files)
        except RuntimeError as error:
            raise ValueError(
                f"A shard in {path} is damaged ({error}); copy it again or prepare its source again."
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'damaged-record'."""
        index = range(len(self))[index]
        where = f"example {index} of {self.path}"
        try:
            example = unpack(self._source[index])
        except (RuntimeError, ValueError) as error:
            raise BadRecord(
                "damaged-record", f"There is a damaged {where} ({error}); prepare its source again."
            ) from error
        return Record(example.image, example.prompt, example.references, example.name or where)
