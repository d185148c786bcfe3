"""What people hand in as an image becomes an upright RGB picture of a size the networks take, and back."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# The published scripts round both edges of an edit to this many pixels (SkyworkAI/UniPic, `fix_longer_edge`).
PUBLISHED_FACTOR = 32


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads an image file completely and turns it into upright RGB.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: when the file is no image, or a damaged one.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no image file {os.fspath(path)!r}; check the path.")
    try:
        with Image.open(path) as image:
            image.load()
            return upright_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        # PIL raises SyntaxError for a broken PNG chunk.
        raise ValueError(
            f"The image file {os.fspath(path)!r} cannot be decoded ({error}); replace it by a sound PNG or JPEG."
        ) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF rotation, lays transparency on white, and converts any mode to RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # PIL clips wide greys to 255 when it converts; 16-bit scans would turn white.
        grey = np.asarray(image, np.float32)
        top = 65535.0 if image.mode != "F" and grey.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(grey * (255.0 / top), 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_pil(image: Any) -> Image.Image:
    """Accepts a PIL image, a path, or an array and returns upright RGB.

    Args:
      image: `PIL.Image`, path, or array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; uint8 in 0..255 or float in 0..1.

    Raises:
      ValueError: when an array has another shape, type or range.
    """
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"An image array must have the shape [H, W, 3] (or [H, W], or 4 channels), not {array.shape}.")
    if array.dtype == np.bool_ or (np.issubdtype(array.dtype, np.integer) and array.dtype != np.uint8):
        raise ValueError(f"An image array must be uint8 (0..255) or float (0..1), not {array.dtype}; convert it.")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("The image array holds NaN or infinite values; clean it before passing it.")
        if array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"A float image array must lie in 0..1, but this one spans {array.min():.3g}..{array.max():.3g}; "
                "rescale it or pass uint8."
            )
        array = (array * 255).round().astype(np.uint8)
    return upright_rgb(Image.fromarray(array))


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


def to_pictures(unit: np.ndarray) -> list[Image.Image]:
    """Images [B, H, W, 3] in [0, 1] -> PIL pictures."""
    return [Image.fromarray(image) for image in (unit * 255).round().astype(np.uint8)]
