"""Pictures come to a size that the networks take, and back; `pictures.decode` reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# The published scripts round both edges of an edit to this many pixels (SkyworkAI/UniPic, `fix_longer_edge`).
PUBLISHED_FACTOR = 32


def check_size(height: int, width: int, multiple: int) -> None:
    """Both edges must be positive multiples of `multiple` (pixels of one patch): one sentence if not."""
    for name, value in (("height", height), ("width", width)):
        if int(value) != value or value < multiple or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise ValueError(
                f"The {name} {value} is not a multiple of the model's patch of {multiple} pixels; use {near}."
            )


def fit_longer_edge(size: tuple[int, int], longer_edge: int, multiple: int) -> tuple[int, int]:
    """The size of an edit: the longer edge becomes `longer_edge`, the shorter keeps the aspect ratio.

    Args:
      size: (height, width) of the picture.
      longer_edge: pixels.
      multiple: pixels of one patch. Where `longer_edge` allows it, edges are rounded to 32 as in the published scripts.

    Returns:
      (height, width), at least one rounding unit each.

    Raises:
      ValueError: when the picture is smaller than a patch.
    """
    height, width = size
    if min(height, width) < multiple:
        raise ValueError(
            f"The image of {width} x {height} pixels is smaller than one patch of {multiple} pixels; use a larger one."
        )
    factor = math.lcm(multiple, PUBLISHED_FACTOR)
    factor = multiple if longer_edge % factor else factor
    check_size(longer_edge, longer_edge, factor)
    scale = longer_edge / max(height, width)
    return tuple(max(factor, round(edge * scale / factor) * factor) for edge in (height, width))


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The picture at this size (bicubic); itself when it has it."""
    return image if image.size == (width, height) else image.resize((width, height))


def to_model(images: Sequence[Image.Image], height: int, width: int) -> np.ndarray:
    """RGB pictures -> float32 [B, height, width, 3] in [-1, 1]; those of another size are resized."""
    fitted = [resized(image, height, width) for image in images]
    return np.stack([np.asarray(image, np.float32) for image in fitted]) / np.float32(127.5) - np.float32(1)


def to_unit(images: Any) -> np.ndarray:
    """Images [B, H, W, 3] in [-1, 1] -> float32 in [0, 1], clipped, as diffusers postprocesses."""
    return np.clip(np.asarray(images, np.float32) / 2 + np.float32(0.5), 0, 1)


def to_uint8(images: Any) -> np.ndarray:
    """Decoded images [B, H, W, 3], about [-1, 1], as uint8."""
    return (to_unit(images) * 255).round().astype(np.uint8)


def to_pictures(unit: np.ndarray) -> list[Image.Image]:
    """Images [B, H, W, 3] in [0, 1] -> PIL pictures."""
    return [Image.fromarray(image) for image in (unit * 255).round().astype(np.uint8)]
