"""A source of records in memory that worker processes can have copies of; as a program, prepares it slowly, to be killed."""

from __future__ import annotations

import io
import os
import sys
import time

import numpy as np
from PIL import Image

from unipic2_jax.data.records import Record
from unipic2_jax.pictures.decode import BadRecord

RESOLUTION, MULTIPLE = 48, 16
# What the tests prepare with.
SETTINGS = {"resolution": RESOLUTION, "multiple": MULTIPLE, "min_size": 24, "shard_size": 8, "image_format": "png"}


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """A random picture that compresses like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def file(picture: Image.Image, kind: str = "PNG") -> bytes:
    """A picture as the bytes of a file."""
    data = io.BytesIO()
    picture.save(data, kind)
    return data.getvalue()


class Unpicklable(Exception):
    """An error that does not find its way back from a worker process by itself."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")
        self.lock = sys.stdout


class MemoryRecords:
    """Records from a list; an entry may be a BadRecord, or the name of something that goes wrong."""

    def __init__(self, records: list, wait: float = 0.0):
        self.records, self.wait = records, wait

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        time.sleep(self.wait)
        found = self.records[index]
        if isinstance(found, BadRecord):
            raise found
        if found == "bug":
            raise Unpicklable("two", "arguments")
        if found == "death":
            os._exit(3)
        return found


def good(seed: int, width: int = 60, height: int = 60, references: int = 0, **changes) -> Record:
    """A record that nothing is wrong with."""
    pictures = [file(smooth(100 * seed + i, width, height)) for i in range(1 + references)]
    values = {
        "image": pictures[0],
        "prompt": f"prompt {seed}",
        "references": tuple(pictures[1:]),
        "name": f"row {seed}",
    }
    return Record(**{**values, **changes})


def mixed() -> list:
    """36 records of several buckets, with duplicates, bad ones and filtered ones among them."""
    shapes = [(60, 60), (100, 56), (56, 100)]
    records = [good(i, *shapes[i % 3], references=int(i % 4 == 3)) for i in range(36)]
    records[5] = BadRecord("not-json", "Line 6 is not JSON.")
    records[11] = records[2]
    records[20] = good(20, 20, 20)
    records[29] = records[27]
    return records


def main(out: str, workers: int) -> None:
    from unipic2_jax.data.prepare import prepare

    prepare(MemoryRecords(mixed(), wait=0.05), out, workers=workers, **SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
