"""WebDataset shards: tar files in which the members of an example have one key.

    key.jpg (.jpeg .png .webp)        the picture to learn; of an edit also key.output.jpg
    key.input.jpg, key.input_0.png    the pictures that were edited, in the order of their numbers; also key.src.jpg, ...
    key.txt                           caption or instruction; else a usual name (`readers.fields`) in key.json

Other members do not matter.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np

from unipic2_jax.data.readers.fields import PROMPT, check_edit, find, parse_json, parse_text
from unipic2_jax.data.readers.files import Paths, find_files
from unipic2_jax.data.records import BadRecord, Record

# A member's extension is all behind the first dot of its name; these are a picture's, in groups: role, number.
_PICTURE = re.compile(r"(?:(output|input|src)(?:_(\d+))?\.)?(?:jpg|jpeg|png|webp)")
_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")


class WebDatasetRecords:
    """The examples of .tar shards. The headers of all members are read once, when the source is made.

    Attributes:
      path: a shard, a folder of .tar files, a glob, or a list of these.

    Raises:
      FileNotFoundError: there is no such shard.
      ValueError: a shard is cut off, damaged or compressed, or there is no example in any.
    """

    def __init__(self, path: Paths):
        self.shards = find_files(path, ".tar")
        # Arrays, because there may be millions: example -> shard, key and the end of its rows [extension, offset, size].
        shards, keys, counts, rows, codes = [], [], [], [], {}
        for shard, file in enumerate(self.shards):
            index = _index(file)
            shards.append(np.full(len(index), shard, np.int32))
            keys.append(np.asarray([key.encode(errors="surrogateescape") for key in index], np.bytes_))
            counts.append(np.asarray([len(members) for members in index.values()], np.int64))
            places = [(codes.setdefault(e, len(codes)), *place) for m in index.values() for e, place in m.items()]
            rows.append(np.asarray(places, np.int64).reshape(-1, 3))
        self._shard, self._keys, self._rows = np.concatenate(shards), np.concatenate(keys), np.concatenate(rows)
        self._ends, self._extensions = np.cumsum(np.concatenate(counts)), list(codes)
        if not len(self):
            raise ValueError(
                f"There is no example in {self.shards[0]}; name shards with members like 'key.jpg', 'key.txt'."
            )

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'missing-image', 'missing-caption', 'missing-reference', 'not-json', 'not-text', 'empty-prompt'."""
        index = range(len(self))[index]
        shard = self.shards[self._shard[index]]
        where = f"{self._keys[index].decode(errors='replace')} of {shard}"
        rows = self._rows[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()
        members = {self._extensions[extension]: (offset, size) for extension, offset, size in rows}
        pictures = {name: match for name in members if (match := _PICTURE.fullmatch(name))}
        targets = [name for name, match in pictures.items() if match[1] in (None, "output")]
        sources = [name for name, match in pictures.items() if match[1] in ("input", "src")]
        if not targets:
            raise BadRecord("missing-image", f"There is no picture of {where}; add a .jpg, .png or .webp member.")
        target = max(targets, key=lambda name: pictures[name][1] == "output")
        with shard.open("rb") as file:

            def read(name: str) -> bytes:
                file.seek(members[name][0])
                return file.read(members[name][1])

            if "txt" in members:
                name, text = None, read("txt")
            else:
                values = parse_json(read("json"), where) if "json" in members else {}
                name = find(values, PROMPT)
                text = values.get(name)
            prompt = parse_text(text, where)
            references = tuple(map(read, sorted(sources, key=lambda name: int(pictures[name][2] or 0))))
            check_edit({name, "output_image" if pictures[target][1] else None}, references, where)
            return Record(read(target), prompt, references, where)


def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> extension -> (offset, size) of a shard's files."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and (match := _KEY.fullmatch(member.name)):
                    found.setdefault(match[1], {})[match[2].lower()] = (member.offset_data, member.size)
            # tarfile takes a damaged header for the end of the file.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no sound uncompressed tar file ({error}); copy or write it again.") from error
    return found
