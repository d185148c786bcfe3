"""Manifests: one JSON object per line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unipic2_jax.data.readers.fields import parse_json, parse_line, read_pictures
from unipic2_jax.data.readers.files import Paths, find_files
from unipic2_jax.data.records import RECORDS, Record
from unipic2_jax.pictures.decode import BadRecord


@RECORDS.register("jsonl")
class JSONLRecords:
    """Lines like {"image": "a.jpg", "caption": "..."} or {"input_images": [...], "instruction": "...", "output_image": ...}.

    Other usual names do as well, see `readers.fields`. Paths are relative to the file; blank lines do not count. Lines are
    found when the source is made, and understood when they are asked for.

    Attributes:
      path: a file, a folder of .jsonl files, a glob, or a list of these.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is no line in it, or the first has pictures of which is not known what they are for.
    """

    def __init__(self, path: Paths):
        self.files = find_files(path, ".jsonl", beside=True)
        found = [_lines(file) for file in self.files]
        self._lines = np.concatenate(found)
        self._ends = np.cumsum([len(lines) for lines in found])  # which records are of which file
        if not len(self):
            raise ValueError(f"There is no line in {self.files[0]}; write one JSON object per line.")
        for start in {0, *self._ends[:-1].tolist()} - {len(self)}:
            _check_pictures(*self._read(start)[:2])

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: see `readers.fields.parse_line`."""
        line, where, folder = self._read(range(len(self))[index])
        return parse_line(parse_json(line, where), folder, where)

    def _read(self, index: int) -> tuple[bytes, str, Path]:
        """A line, what it is called, and the folder of its file."""
        number, offset = self._lines[index].tolist()
        path = self.files[np.searchsorted(self._ends, index, side="right")]
        where = f"line {number} of {path}"
        with path.open("rb") as file:
            file.seek(offset)
            return file.readline(), where, path.parent


def _check_pictures(line: bytes, where: str) -> None:
    """Refuses a manifest whose pictures go by unknown names; a line that says nothing is a bad record later."""
    try:
        values = parse_json(line, where)
    except BadRecord:
        return
    read_pictures(values, where)


def _lines(path: Path) -> np.ndarray:
    """int64 [lines, 2]: number from 1, and byte offset."""
    starts, offset = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                starts.append((number, offset))
            offset += len(line)
    return np.asarray(starts, np.int64).reshape(-1, 2)
