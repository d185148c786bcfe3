"""A picture as people keep it (a file, its bytes, an array) becomes an upright RGB one, or one sentence that says why not."""

from __future__ import annotations

import functools
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unipic2_jax.data.records import BadRecord, Encoded

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
# What data is read from. PIL knows more formats, of which some start programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
# Others with several pictures in a file are stills: the pages of a TIFF, the previews of a telephone's JPEG (MPO).
_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")


def decode(encoded: Encoded, name: str = "", *, max_pixels: int | None = None, animated: bool = True) -> Image.Image:
    """A picture of a data set as upright RGB; of an animation, the first frame.

    Args:
      encoded: a file, a file's bytes, or pixels uint8 [H, W, 3].
      name: where it came from, for messages: 'line 3 of train.jsonl'.
      max_pixels: larger pictures are refused by what their header says, before memory is taken for them; by default PIL's
        own limit, `Image.MAX_IMAGE_PIXELS`. More than twice PIL's limit needs that one to be raised too.
      animated: False refuses animations.

    Raises:
      BadRecord: 'missing-image', 'unreadable-file', 'empty-file', 'not-an-image', 'truncated-image' (cut off, or damaged
        behind its header), 'decompression-bomb' or 'animated-image'.
    """
    what = "The picture" + (f" {encoded}" if isinstance(encoded, Path) else "") + (f" of {name}" if name else "")
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    reason = "not-an-image"
    try:
        if isinstance(encoded, np.ndarray):
            _check_pixels(math.prod(encoded.shape[:2]), limit)
            return to_pil(encoded)
        with Image.open(io.BytesIO(_content(encoded, what)), formats=_formats()) as image:
            _check_pixels(image.width * image.height, limit)
            if not animated and image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False):
                raise BadRecord("animated-image", f"{what} is an animation; allow animations or remove it.")
            reason = "truncated-image"
            image.load()
            return upright_rgb(image)
    except BadRecord:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        sentence = f"{what} is larger than the limit of {limit} pixels; raise the limit or remove it."
        raise BadRecord("decompression-bomb", sentence) from error
    except Exception as error:  # PIL raises whatever damaged bytes make its readers stumble over
        sentence = f"{what} cannot be decoded ({_one_line(error)}); replace it by a sound PNG or JPEG."
        raise BadRecord(reason, sentence) from error


def _check_pixels(count: int, limit: int | None) -> None:
    if limit is not None and count > limit:
        raise Image.DecompressionBombError


def _content(encoded: Path | bytes, what: str) -> bytes:
    try:
        data = encoded.read_bytes() if isinstance(encoded, Path) else encoded
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadRecord("missing-image", f"{what} does not exist; correct the path.") from error
    except OSError as error:
        raise BadRecord("unreadable-file", f"{what} cannot be read ({error.strerror}); check the file.") from error
    if not data:
        raise BadRecord("empty-file", f"{what} is empty (0 bytes); replace or remove it.")
    return data


@functools.cache
def _formats() -> list[str]:
    Image.init()  # otherwise only the commonest formats are known
    return [name for name in _FORMATS if name in Image.OPEN]  # AVIF is new in Pillow 11.3


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known format"  # PIL's sentence names an object in memory
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


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
            f"The image file {os.fspath(path)} cannot be decoded ({error}); replace it by a sound PNG or JPEG."
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
