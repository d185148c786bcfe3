"""Prepared data: ArrayRecord shards of decoded, filtered and bucketed examples, and a JSON file that says what is in them.

    DIR/dataset.json                      resolution, shards with their bucket and count, what was dropped and why
    DIR/1x1-ref1-00003.array_record       examples of one bucket

A record is a safetensors file: the pictures as encoded files ('image', 'reference_0', ... as bytes), whatever else was
computed before training as arrays, and the prompt in its metadata.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save

from unipic2_jax.data.buckets import Bucket

FORMAT = "unipic2-examples-1"
INDEX = "dataset.json"


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedExample:
    """One record of a shard.

    Attributes:
      image: an encoded picture (PNG, JPEG or WebP).
      references: encoded, of the same size.
      arrays: computed beforehand, by name: the VAE's 'mean' and 'logvar' [h, w, C], 'reference_mean' and
        'reference_logvar' [R, h, w, C], the conditioner's 'context' [S, J] and 'pooled' [P].
    """

    image: bytes
    prompt: str
    references: tuple[bytes, ...] = ()
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    name: str = ""


def pack(example: PreparedExample) -> bytes:
    """An example as the bytes of a record."""
    pictures = {"image": example.image} | {f"reference_{i}": data for i, data in enumerate(example.references)}
    tensors = {name: np.frombuffer(data, np.uint8) for name, data in pictures.items()}
    clash = tensors.keys() & example.arrays.keys()
    if clash:
        raise ValueError(f"An array of an example must not be called '{clash.pop()}'; rename it.")
    # One entry: safetensors writes several in an order that is random, and the same data must be the same bytes.
    metadata = {"example": json.dumps({"prompt": example.prompt, "name": example.name})}
    return save({**tensors, **{k: np.ascontiguousarray(v) for k, v in example.arrays.items()}}, metadata)


def unpack(data: bytes) -> PreparedExample:
    """The inverse of `pack`.

    Raises:
      ValueError: when these are not the bytes of a record.
    """
    try:
        tensors = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["example"])
        image = tensors.pop("image").tobytes()
        prompt, name = metadata["prompt"], metadata["name"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"A record of prepared data is damaged ({error}); prepare its source again.") from error
    count = sum(re.fullmatch(r"reference_\d+", key) is not None for key in tensors)
    references = tuple(tensors.pop(f"reference_{i}").tobytes() for i in range(count))
    return PreparedExample(image, prompt, references, tensors, name)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a prepared folder."""

    file: str
    bucket: Bucket
    count: int


@dataclasses.dataclass(frozen=True)
class PreparedIndex:
    """What dataset.json says.

    Attributes:
      resolution: pixels; a square picture has resolution^2 of them.
      multiple: pixels that every edge is a multiple of.
      shards: in the order they were written.
      arrays: names of what was computed beforehand.
      summary: counts of what was read, kept and dropped, for people.
    """

    resolution: int
    multiple: int
    shards: tuple[Shard, ...]
    arrays: tuple[str, ...] = ()
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The text of dataset.json."""
        shards = [
            {"file": s.file, "aspect": s.bucket.aspect, "references": s.bucket.references, "count": s.count}
            for s in self.shards
        ]
        values = {
            "format": FORMAT,
            "resolution": self.resolution,
            "multiple": self.multiple,
            "arrays": list(self.arrays),
            "summary": dict(self.summary),
            "shards": shards,
        }
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> PreparedIndex:
        """The index of a prepared folder whose files are all there.

        Raises:
          FileNotFoundError: the folder, its index or a shard is missing.
          ValueError: the index is damaged, or of another format.
        """
        path = Path(folder) / INDEX
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {INDEX}, so it is no finished prepared data; run launch.prepare_data with --out there."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, not {FORMAT!r}")
            shards = tuple(Shard(s["file"], Bucket(s["aspect"], s["references"]), s["count"]) for s in values["shards"])
            index = cls(values["resolution"], values["multiple"], shards, tuple(values["arrays"]), values["summary"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); prepare its source again.") from error
        if missing := [s.file for s in shards if not (Path(folder) / s.file).is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks the shard {missing[0]}; copy it again or prepare its source again."
            )
        return index

    def buckets(self) -> dict[Bucket, int]:
        """How many examples each bucket has."""
        counts: dict[Bucket, int] = {}
        for shard in self.shards:
            counts[shard.bucket] = counts.get(shard.bucket, 0) + shard.count
        return counts


class PreparedBucket:
    """The examples of one bucket of a prepared folder, by number: a random-access source of grain."""

    def __init__(self, folder: str | Path, index: PreparedIndex, bucket: Bucket):
        files = [str(Path(folder) / shard.file) for shard in index.shards if shard.bucket == bucket]
        self.source = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> PreparedExample:
        return unpack(self.source[index])
