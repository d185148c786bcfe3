"""A folder of pictures with their captions beside them."""

from __future__ import annotations

import os
from pathlib import Path

from unipic2_jax.data.images import SUFFIXES
from unipic2_jax.data.readers.fields import parse_text
from unipic2_jax.data.readers.files import visible_files
from unipic2_jax.data.readers.jsonl import JSONLRecords
from unipic2_jax.data.records import BadRecord, Record

MANIFEST = "metadata.jsonl"
CAPTION_SUFFIXES = (".txt", ".caption")  # the first that is there counts


class FolderRecords:
    """Every picture below a folder, sorted by path, with the text in the .txt or .caption file of the same stem beside
    it.

    Where there is a metadata.jsonl at any depth (the imagefolder layout of Hugging Face: lines with `file_name` and
    `caption`, `text` or `prompt`), its lines are the records, and pictures that it does not list are not read.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there is no picture in it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise FileNotFoundError(f"There is no folder {path}; check the path.")
        manifests = [file for file in visible_files(self.path, MANIFEST) if file.name == MANIFEST]
        self._listed = JSONLRecords(manifests) if manifests else None
        self._files = [] if manifests else [str(file) for file in visible_files(self.path, *SUFFIXES)]
        if not len(self):
            raise ValueError(f"There is no picture in {path}; name a folder that has some.")

    def __len__(self) -> int:
        return len(self._files) if self._listed is None else len(self._listed)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'missing-caption', 'not-text', 'empty-prompt', and with metadata.jsonl those of JSONLRecords."""
        if self._listed is not None:
            return self._listed[index]
        image = Path(self._files[index])
        beside = [image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
        caption = next((file for file in beside if file.is_file()), None)
        if caption is None:
            raise BadRecord(
                "missing-caption", f"The picture {image} has no caption; write it to {beside[0].name} beside it."
            )
        return Record(image, parse_text(caption.read_bytes(), str(caption)), name=str(image))
