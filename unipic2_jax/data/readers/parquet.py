"""Parquet files, as Hugging Face keeps data sets."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unipic2_jax.data.readers.fields import TEXT_LISTS, check_columns, check_edit, parse_text, pick_columns, pick_text
from unipic2_jax.data.readers.files import Paths, find_files
from unipic2_jax.data.records import RECORDS, Record
from unipic2_jax.pictures.decode import BadRecord, Encoded

# Threads that read in order meet at a border of two row groups.
CACHED_GROUPS = 2


@RECORDS.register("parquet")
class ParquetRecords:
    """Rows of Parquet files. Pictures are bytes, Hugging Face's {bytes, path}, or (in columns that are named) paths
    relative to the file; several references are a list. A row whose reference is null has none.

    Row groups are read whole and the last two are kept for all threads, so records should be asked for in order.

    Attributes:
      path: a file, a folder of .parquet files, a glob, or a list of these; the columns of the first count for all.
      image, prompt: columns; by default the first usual name (`readers.fields`) of a fitting type.
      references: a column or several; by default a usual name too, () for none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is no Parquet, lacks a column, has one with pictures of unknown use, or there is no row in any.
    """

    def __init__(
        self,
        path: Paths,
        image: str | None = None,
        prompt: str | None = None,
        references: str | Sequence[str] | None = None,
    ):
        self.files = find_files(path, ".parquet")
        schema = _open(self.files[0]).schema_arrow
        pictures = [field.name for field in schema if _is_picture(field.type)]
        texts = [field.name for field in schema if _is_text(field.type, field.name in TEXT_LISTS)]
        where = str(self.files[0])
        self.image, self.prompt, self.references = pick_columns(image, prompt, references, pictures, texts, where)
        self._columns = [self.image, self.prompt, *self.references]
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        counts = []
        for number, file in enumerate(self.files):
            opened = _open(file)
            if missing := set(self._columns) - set(opened.schema_arrow.names):
                columns = ", ".join(opened.schema_arrow.names)
                raise ValueError(f"{file} has no column '{missing.pop()}'; name one of {columns}.")
            self._groups += [(number, group) for group in range(opened.num_row_groups)]
            counts += [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        if references is None:
            check_columns(pictures, (self.image, *self.references), where)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._cache: _Cache | None = None
        if not len(self):
            raise ValueError(f"There is no row in {self.files[0]}; name files that have some.")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'damaged-record', 'missing-image', 'missing-caption', 'missing-reference', 'not-text' or 'empty-prompt'."""
        index = range(len(self))[index]
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[group - 1]) if group else 0)
        file = self.files[self._groups[group][0]]
        where = f"row {row} of row group {self._groups[group][1]} of {file}"
        try:
            table = self._table(group)
            values = {name: table.column(name)[row].as_py() for name in self._columns}
        except UnicodeDecodeError as error:
            raise BadRecord("not-text", f"A text in {where} is not UTF-8 ({error.reason}); correct it.") from error
        except (pa.ArrowException, OSError) as error:
            sentence = f"There is damage in {where} ({_one_line(error)}); copy or write the file again."
            raise BadRecord("damaged-record", sentence) from error
        image = _pictures(values[self.image], file, where)
        if len(image) != 1:
            raise BadRecord("missing-image", f"There are {len(image)} pictures in {where}; one is needed.")
        references = tuple(picture for name in self.references for picture in _pictures(values[name], file, where))
        if self.references:
            check_edit({self.image, self.prompt}, references, where)
        return Record(image[0], parse_text(pick_text(self.prompt, values[self.prompt]), where), references, where)

    def _table(self, group: int) -> pa.Table:
        """A row group from the cache, or read while the other threads, which mostly want the same one, wait."""
        cache = self._cache
        if cache is None or cache.process != os.getpid():  # a lock that another process holds would never open
            cache = self._cache = _Cache()
        with cache.lock:
            if group not in cache.tables:
                while len(cache.tables) >= CACHED_GROUPS:
                    cache.tables.pop(next(iter(cache.tables)))
                number, inside = self._groups[group]
                cache.tables[group] = _open(self.files[number]).read_row_group(inside, self._columns, use_threads=False)
            return cache.tables[group]


class _Cache:
    """The cache of one process."""

    def __init__(self):
        self.process, self.lock, self.tables = os.getpid(), threading.Lock(), {}


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no sound Parquet file ({_one_line(error)}); copy or write it again.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _is_text(kind: pa.DataType, lists: bool = False) -> bool:
    if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_picture(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _pictures(value: Any, file: Path, where: str) -> list[Encoded]:
    """The pictures of a cell: none where it is null, several where it is a list."""
    if isinstance(value, list):
        return [picture for item in value for picture in _pictures(item, file, where)]
    if isinstance(value, dict):  # Hugging Face's struct has bytes, or else the path
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        value = file.parent / value
    if not isinstance(value, bytes | Path | None):
        raise BadRecord(
            "missing-image", f"There is {type(value).__name__} for a picture in {where}; name another column."
        )
    return [] if value is None else [value]
