"""Manifests: one JSON object per line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unipic2_jax.data.readers.fields import parse_json, parse_line
from unipic2_jax.data.readers.files import Paths, find_files
from unipic2_jax.data.records import Record


class JSONLRecords:
    """Lines like {"image": "a.jpg", "caption": "..."} or {"input_images": [...], "instruction": "...", "output_image": ...}.

    Other usual names do as well, see `readers.fields`. Paths are relative to the file; blank lines do not count. Lines are
    found when the source is made, and understood when they are asked for.

    Attributes:
      path: a file, a folder of .jsonl files, a glob, or a list of these.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is no line in it.
    """

    def __init__(self, path: Paths):
        self.files = find_files(path, ".jsonl")
        found = [_lines(file) for file in self.files]
        self._lines = np.concatenate(found)
        self._ends = np.cumsum([len(lines) for lines in found])  # which records are of which file
        if not len(self):
            raise ValueError(f"There is no line in {self.files[0]}; write one JSON object per line.")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'not-json', 'missing-field', 'missing-image', 'missing-reference', 'not-text', 'empty-prompt'."""
        index = range(len(self))[index]
        number, offset = self._lines[index].tolist()
        path = self.files[np.searchsorted(self._ends, index, side="right")]
        where = f"line {number} of {path}"
        with path.open("rb") as file:
            file.seek(offset)
            line = file.readline()
        return parse_line(parse_json(line, where), path.parent, where)


def _lines(path: Path) -> np.ndarray:
    """int64 [lines, 2]: number from 1, and byte offset."""
    found, offset = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append((number, offset))
            offset += len(line)
    return np.asarray(found, np.int64).reshape(-1, 2)
