"""What becomes of one record in preparation, whatever the others are; grain's threads or worker processes do this part."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from unipic2_jax.data.buckets import ASPECTS, MULTIPLE, Bucket, bucket_size, crop_to, nearest_aspect
from unipic2_jax.data.prepared import PreparedExample
from unipic2_jax.data.records import RecordSource
from unipic2_jax.data.text import check_unicode
from unipic2_jax.pictures.decode import BadRecord, decode

# Reasons to leave out sound records; all others are those of bad ones, which are limited in number.
FILTERS = ("too-small", "aspect", "empty-prompt", "long-prompt", "pair-size", "duplicate")
# An edit's picture and its only reference may differ so much in aspect ratio: roundings of an edge, not another crop.
PAIR_TOLERANCE = 1.02
DIGEST_BYTES = 16
# Format -> what PIL is told; the quality is added to those that have one.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {"subsampling": 0}),
    "webp": ("WEBP", {}),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides what is kept and how it is stored.

    Attributes:
      resolution: pixels; a square picture gets resolution^2 of them, and other buckets about as many.
      multiple: pixels that every edge is a multiple of.
      aspects: the buckets' aspect ratios, of `buckets.ASPECTS`.
      min_size: pixels that the shorter edge of every picture must have; half the resolution if None, so that nothing is
        enlarged more than twice.
      max_aspect: longer by shorter edge; a picture that is longer would lose much of itself.
      max_prompt: characters.
      image_format: 'jpeg' (without chroma subsampling), 'webp', or 'png', which loses nothing.
      quality: 1 to 100, of JPEG and WebP.
      shard_size: records of a chunk; a shard holds at most so many examples.

    Raises:
      ValueError: for values outside of these ranges.
    """

    resolution: int
    multiple: int = MULTIPLE
    aspects: tuple[str, ...] = tuple(ASPECTS)
    min_size: int | None = None
    max_aspect: float = 2.5
    max_prompt: int = 2000
    image_format: str = "jpeg"
    quality: int = 95
    shard_size: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "aspects", tuple(self.aspects))
        if self.min_size is None:
            object.__setattr__(self, "min_size", self.resolution // 2)
        if not self.aspects:
            raise ValueError("There are no aspect ratios to sort pictures by; name at least '1:1'.")
        for aspect in self.aspects:
            bucket_size(aspect, self.resolution, self.multiple)
        if self.image_format not in FORMATS:
            raise ValueError(f"The image format {self.image_format!r} is not one of {', '.join(FORMATS)}; choose one.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"The quality {self.quality} is outside of 1 to 100; choose one within.")
        for name in ("max_aspect", "max_prompt", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1.")

    def encoded(self, pixels: np.ndarray) -> bytes:
        """A picture uint8 [H, W, 3] as a file."""
        file, (name, options) = io.BytesIO(), FORMATS[self.image_format]
        # Made of nothing but pixels, so that no colour profile or thumbnail of the source comes along.
        Image.fromarray(pixels).save(file, name, **options, **({} if name == "PNG" else {"quality": self.quality}))
        return file.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """A record that passed; `pixels` uint8 [1 + R, H, W, 3] are what its files decode to, where they are asked for."""

    bucket: Bucket
    example: PreparedExample
    digest: str
    pixels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record that did not."""

    name: str
    reason: str
    message: str
    is_bad: bool = False

    def to_json(self) -> dict[str, str]:
        """A line of dropped.jsonl."""
        return {"name": self.name, "reason": self.reason, "message": self.message}


class Examine:
    """Everything about one record that needs no other; workers have copies of it."""

    def __init__(self, source: RecordSource, settings: Settings, with_pixels: bool):
        self.source, self.settings, self.with_pixels = source, settings, with_pixels

    def __call__(self, number: int) -> Kept | Dropped:
        name = f"record {number}"
        try:
            record = self.source[number]
            name = _text(record.name) or name
            return self._examined(record, name)
        except BadRecord as error:
            return Dropped(name, error.reason, _text(str(error)), is_bad=error.reason not in FILTERS)
        except Exception as error:
            # Workers hand errors on by pickling. Not every error survives that, and one that does not would be lost.
            bug = RuntimeError(f"Reading {name} of the source failed with {type(error).__name__}: {error}")
            bug.add_note(traceback.format_exc())
            raise bug from error

    def _examined(self, record: Any, name: str) -> Kept:
        settings, prompt = self.settings, record.prompt
        if not prompt.strip():
            raise BadRecord("empty-prompt", f"{name} has an empty prompt.")
        if len(prompt) > settings.max_prompt:
            raise BadRecord(
                "long-prompt",
                f"{name} has a prompt of {len(prompt)} characters, and max_prompt is {settings.max_prompt}.",
            )
        check_unicode(prompt, f"the prompt of {name}")
        pictures = [decode(picture, name) for picture in (record.image, *record.references)]
        for width, height in (picture.size for picture in pictures):
            found = f"{name} has a picture of {width} x {height} pixels"
            if min(width, height) < settings.min_size:
                raise BadRecord("too-small", f"{found}, and min_size is {settings.min_size}.")
            if max(width, height) > settings.max_aspect * min(width, height):
                raise BadRecord("aspect", f"{found}, and max_aspect is {settings.max_aspect:g}.")
        target, *references = pictures
        if len(references) == 1:
            ratio = target.width * references[0].height / (target.height * references[0].width)
            if max(ratio, 1 / ratio) > PAIR_TOLERANCE:
                sizes = " made from ".join(f"{p.width} x {p.height}" for p in pictures)
                raise BadRecord("pair-size", f"{name} has a picture of {sizes} pixels, which is another aspect ratio.")
        bucket = Bucket(nearest_aspect(*target.size, settings.aspects), len(references))
        size = bucket_size(bucket.aspect, settings.resolution, settings.multiple)
        cropped = [np.asarray(crop_to(picture, *size)) for picture in pictures]
        image, *others = (settings.encoded(pixels) for pixels in cropped)
        # Of the stored files: what is computed beforehand is what training would compute from them.
        pixels = np.stack([np.asarray(decode(file)) for file in (image, *others)]) if self.with_pixels else None
        return Kept(bucket, PreparedExample(image, prompt, tuple(others), name=name), _digest(cropped, prompt), pixels)


def _digest(pictures: Sequence[np.ndarray], prompt: str) -> str:
    """What two records have in common only when they are duplicates."""
    digest = hashlib.blake2b(json.dumps([prompt, [p.shape for p in pictures]]).encode(), digest_size=DIGEST_BYTES)
    for pixels in pictures:
        digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def _text(text: str) -> str:
    """The text, without what UTF-8 cannot hold: names of files may be any bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def examined_records(examine: Examine, start: int, stop: int, workers: int) -> Iterator[Kept | Dropped]:
    """The records from `start` to `stop`, examined, in order."""
    # Buffers hold whole pictures, so they are short.
    threads = 2 if workers else os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    dataset = grain.MapDataset.range(start, stop).map(examine).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own, which a program without absl's never parses
            flags.FLAGS.mark_as_parsed()
        # A worker without a record of its own would be an error of grain's.
        count = min(workers, stop - start)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(count, per_worker_buffer_size=4), _end_with_parent)
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _end_with_parent(index: int, count: int) -> None:
    """Makes a worker end when its parent is killed; by itself it would wait for ever for someone to take its results."""
    del index, count
    if (parent := multiprocessing.parent_process()) is not None:

        def wait() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()
