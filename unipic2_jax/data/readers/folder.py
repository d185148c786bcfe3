"""A folder of pictures with their captions beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from unipic2_jax.core.addresses import local
from unipic2_jax.data.readers.fields import parse_text
from unipic2_jax.data.readers.files import visible_files
from unipic2_jax.data.readers.jsonl import JSONLRecords
from unipic2_jax.data.records import RECORDS, Record
from unipic2_jax.pictures.decode import SUFFIXES, BadRecord

MANIFEST = "metadata.jsonl"
CAPTION_SUFFIXES = (".txt", ".caption")  # the first that is there counts


@RECORDS.register("folder")
class FolderRecords:
    """Every picture below a folder, sorted by path, with the text in the .txt or .caption file of the same stem beside
    it.

    Where there is a metadata.jsonl at any depth (the imagefolder layout of Hugging Face: lines with `file_name` and
    `caption`, `text` or `prompt`), its lines are the records, and pictures that it does not list are not read.

    Attributes:
      references: folders in which the pictures that were edited have the names of what they became, whatever the extension
        (the control folders of other trainers); a number behind a name (cat_0, cat_1) tells several apart.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there is no picture in it, or it has a metadata.jsonl and `references` are given.
    """

    def __init__(
        self, path: str | os.PathLike[str], references: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = ()
    ):
        self.path = Path(local(path)).expanduser()
        listed = [references] if isinstance(references, (str, os.PathLike)) else references
        self.references = [Path(local(folder)).expanduser() for folder in listed]
        for folder in (self.path, *self.references):
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no folder {folder}; check the path.")
        manifests = [file for file in visible_files(self.path, MANIFEST) if file.name == MANIFEST]
        self._listed = JSONLRecords(manifests) if manifests else None
        if manifests and self.references:
            raise ValueError(f"{manifests[0]} says what was edited, and so do references; leave one of them out.")
        is_own = lambda file: not any(folder != self.path and folder in file.parents for folder in self.references)
        self._files = [] if manifests else [str(file) for file in visible_files(self.path, *SUFFIXES) if is_own(file)]
        self._sources = [_by_name(folder) for folder in self.references]
        if not len(self):
            raise ValueError(f"There is no picture in {path}; name a folder that has some.")

    def __len__(self) -> int:
        return len(self._files) if self._listed is None else len(self._listed)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'missing-caption', 'missing-reference', 'not-text', 'empty-prompt', and with metadata.jsonl those of JSONLRecords."""
        if self._listed is not None:
            return self._listed[index]
        image = Path(self._files[index])
        beside = [image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
        caption = next((file for file in beside if file.is_file()), None)
        if caption is None:
            raise BadRecord(
                "missing-caption", f"The picture {image} has no caption; write it to {beside[0].name} beside it."
            )
        name = image.relative_to(self.path).with_suffix("").as_posix()
        for folder, sources in zip(self.references, self._sources):
            if name not in sources:
                sentence = f"The picture {image} has no picture of that name in {folder}; add what was edited."
                raise BadRecord("missing-reference", sentence)
        references = tuple(path for sources in self._sources for path in sources[name])
        return Record(image, parse_text(caption.read_bytes(), str(caption)), references, str(image))


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """The pictures below a folder by their names, and the numbered ones also by what stands before the number, in order."""
    by_name: dict[str, list[Path]] = {}
    numbered: dict[str, list[tuple[int, Path]]] = {}
    for file in visible_files(folder, *SUFFIXES):
        name = file.relative_to(folder).with_suffix("").as_posix()
        by_name.setdefault(name, []).append(file)
        if match := re.fullmatch(r"(.+)_(\d+)", name):
            numbered.setdefault(match[1], []).append((int(match[2]), file))
    return {name: [file for _, file in sorted(files)] for name, files in numbered.items()} | by_name
