"""WebDataset shards: tar files in which the members of an example have one key.

    key.jpg (.png .webp ...)          the picture to learn; of an edit also key.output.jpg
    key.input.jpg, key.input_0.png    the pictures that were edited, in the order of their numbers; also key.src.jpg, ...
    key.txt, key.caption              caption or instruction; else a usual name in key.json

The names of pictures and texts are those of `readers.fields`. The key is what stands before the first dot of a name, with its
folder. Where no member has just that and an extension (scan.001.jpg, scan.001.txt), it is the name without its extension.
Other members do not matter, except for pictures of unknown use and members of which there are two: those are refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unipic2_jax.data.readers.fields import (
    EDIT_TEXTS,
    EXAMPLE_TEXTS,
    check_edit,
    find_pictures,
    first,
    is_known,
    parse_json,
    parse_text,
    pick_text,
)
from unipic2_jax.data.readers.files import Paths, find_files
from unipic2_jax.data.records import RECORDS, Record
from unipic2_jax.pictures.decode import SUFFIXES, BadRecord

_PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_TEXTS, _JSON = (".txt", ".caption"), ".json"


class _Member(NamedTuple):
    """A file of a shard.

    Attributes:
      name: of the file.
      key: what stands before the first dot of the name, with its folder.
      middle: what stands between the key and the role.
      field: the role of a picture that has one (input_0), else its extension (jpg); of other files the extension with a dot.
      place: offset and size.
    """

    name: str
    key: str
    middle: str
    field: str
    place: tuple[int, int]


@RECORDS.register("webdataset")
class WebDatasetRecords:
    """The examples of .tar shards. The headers of all members are read once, when the source is made.

    Attributes:
      path: a shard, a folder of .tar files, a glob, or a list of these.

    Raises:
      FileNotFoundError: there is no such shard.
      ValueError: a shard is cut off, damaged or compressed, has two members of one name or pictures of unknown use, or there is
        no example in any.
    """

    def __init__(self, path: Paths):
        self.shards = find_files(path, ".tar")
        # Arrays, because there may be millions: example -> shard, key and the end of its rows [field, offset, size].
        shards, keys, counts, rows, codes = [], [], [], [], {}
        for shard, file in enumerate(self.shards):
            index = _index(file)
            shards.append(np.full(len(index), shard, np.int32))
            keys.append(np.asarray([key.encode(errors="surrogateescape") for key in index], np.bytes_))
            counts.append(np.asarray([len(members) for members in index.values()], np.int64))
            places = [(codes.setdefault(e, len(codes)), *place) for m in index.values() for e, place in m.items()]
            rows.append(np.asarray(places, np.int64).reshape(-1, 3))
        self._shard, self._keys, self._rows = np.concatenate(shards), np.concatenate(keys), np.concatenate(rows)
        self._ends, self._fields = np.cumsum(np.concatenate(counts)), list(codes)
        if not len(self):
            raise ValueError(
                f"There is no example in {self.shards[0]}; name shards with members like 'key.jpg', 'key.txt'."
            )

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'missing-image', 'missing-caption', 'missing-reference', 'not-json', 'not-text', ...."""
        index = range(len(self))[index]
        shard = self.shards[self._shard[index]]
        where = f"{self._keys[index].decode(errors='replace')} of {shard}"
        rows = self._rows[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()
        members = {self._fields[field]: (offset, size) for field, offset, size in rows}
        image, names = find_pictures([name for name in members if not name.startswith(".")], where)
        if image is None:
            raise BadRecord("missing-image", f"There is no picture of {where}; add a .jpg, .png or .webp member.")
        with shard.open("rb") as file:

            def read(name: str) -> bytes:
                file.seek(members[name][0])
                return file.read(members[name][1])

            if (text := first(_TEXTS, members)) is not None:
                name, prompt = None, read(text)
            else:
                values = parse_json(read(_JSON), where) if _JSON in members else {}
                held = [name for name, value in values.items() if value is not None]
                name = first(EDIT_TEXTS if names else EXAMPLE_TEXTS, held)
                prompt = pick_text(name, values.get(name))
            prompt = parse_text(prompt, where)
            references = tuple(map(read, names))
            check_edit((name, image), references, where)
            return Record(read(image), prompt, references, where)


def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> field -> (offset, size) of a shard's files."""
    groups: dict[str, list[_Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isfile() and (member := _member(info.name, (info.offset_data, info.size))):
                    groups.setdefault(member.key, []).append(member)
            # tarfile takes a damaged header for the end of the file.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no sound uncompressed tar file ({error}); copy or write it again.") from error
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for members in groups.values():
        for key, member in _keyed(members, path):
            member_files = found.setdefault(key, {})
            if member.field in member_files:
                raise ValueError(
                    f"The member {member.name} of {path} is not the only one for '{member.field}' of '{key}'; give every example "
                    "a name of its own."
                )
            member_files[member.field] = member.place
    return found


def _member(name: str, place: tuple[int, int]) -> _Member | None:
    """A file by its name; None for hidden ones and those without an extension."""
    folder, slash, base = name.rpartition("/")
    start, *middle = base.split(".")
    if not start or not middle:
        return None
    field = middle.pop().lower()
    if field not in _PICTURES:
        field = f".{field}"
    elif middle and is_known(middle[-1].lower()):
        field = middle.pop().lower()
    return _Member(name, folder + slash + start, ".".join(middle), field, place)


def _keyed(members: list[_Member], path: Path) -> Iterable[tuple[str, _Member]]:
    """The examples' keys of files whose names begin alike.

    Raises:
      ValueError: when there are pictures that belong to the key and others that may be examples of their own.
    """
    if all(member.middle for member in members):
        return [(f"{member.key}.{member.middle}", member) for member in members]
    for member in members:
        if member.middle and not member.field.startswith("."):
            raise ValueError(
                f"The member {member.name} of {path} has the key '{member.key}' of other members and a picture of unknown use "
                f"('{member.middle}'); write '-' for '.' within names, or call it input or output."
            )
    return [(member.key, member) for member in members if not member.middle]
