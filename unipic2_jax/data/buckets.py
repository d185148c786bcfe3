"""Buckets: the few shapes that pictures are brought to, so that every batch has one shape (paper section 3.1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from PIL import Image

# Width to height. The paper names the landscape ones; portraits are their mirror images.
ASPECTS: dict[str, float] = {
    "1:1": 1.0,
    "4:3": 4 / 3,
    "3:2": 3 / 2,
    "16:9": 16 / 9,
    "3:4": 3 / 4,
    "2:3": 2 / 3,
    "9:16": 9 / 16,
}
# Edges are multiples of so many pixels at full size.
MULTIPLE = 32


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """What all examples of a batch share, whatever the resolution: an aspect ratio and the number of references."""

    aspect: str
    references: int = 0

    def __str__(self) -> str:
        return self.aspect.replace(":", "x") + (f"-ref{self.references}" if self.references else "")

    @property
    def task(self) -> str:
        """'edit' with references, else 't2i'."""
        return "edit" if self.references else "t2i"


def bucket_size(aspect: str, resolution: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """(height, width) of an aspect ratio: about resolution^2 pixels, both edges multiples of `multiple`.

    Raises:
      ValueError: for an unknown aspect ratio, or a resolution that is no multiple.
    """
    if aspect not in ASPECTS:
        raise ValueError(f"The aspect ratio {aspect!r} is not a bucket; use one of {', '.join(ASPECTS)}.")
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"The resolution {resolution} must be a positive multiple of {multiple} pixels.")
    stretch = math.sqrt(ASPECTS[aspect])
    edge = lambda length: max(1, round(length / multiple)) * multiple
    return edge(resolution / stretch), edge(resolution * stretch)


def nearest_aspect(width: int, height: int, aspects: Iterable[str] = tuple(ASPECTS)) -> str:
    """The one of `aspects` that crops least: nearest in log ratio."""
    return min(aspects, key=lambda name: abs(math.log(ASPECTS[name] * height / width)))


def crop_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """The picture scaled (Lanczos) until it covers height x width, and its middle."""
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    covered_width, covered_height = width / scale, height / scale
    left, top = (image.width - covered_width) / 2, (image.height - covered_height) / 2
    box = (left, top, left + covered_width, top + covered_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
