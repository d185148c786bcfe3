"""A picture as people keep it (a file, its bytes, an array) becomes an upright RGB one, or one sentence that says why not."""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

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
        behind its header), 'decompression-bomb', 'animated-image' or 'unknown-range' (numbers of which nobody says what is white).
    """
    what = "The picture" + (f" {encoded}" if isinstance(encoded, Path) else "") + (f" of {name}" if name else "")
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    reason = "not-an-image"
    try:
        if isinstance(encoded, np.ndarray):
            _check_pixels(math.prod(encoded.shape[:2]), limit)
            return to_pil(encoded)
        content = _without_texts(_content(encoded, what))
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            _check_pixels(image.width * image.height, limit)
            if not animated and image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False):
                raise BadRecord("animated-image", f"{what} is an animation; allow animations or remove it.")
            reason = "truncated-image"
            image.load()
            return upright_rgb(image)
    except BadRecord:
        raise
    except UnknownRange as error:
        raise BadRecord("unknown-range", f"{what} cannot be read: {error}") from error
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


# Chunks of a PNG that say nothing about its pixels, and their keywords of which PIL reads how the picture is turned.
_TEXT_CHUNKS, _TURNED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP"), (b"XML:com.adobe.xmp", b"Raw profile type exif")
_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")  # length of the content and kind; a checksum follows the content


def _without_texts(content: bytes) -> bytes:
    """A PNG without texts and colour profiles, for the sake of which PIL refuses a sound one when they are long; else itself."""
    if not content.startswith(_PNG):
        return content
    kept, start, place, names = [], 0, len(_PNG), set()
    while place + _CHUNK.size <= len(content):
        length, kind = _CHUNK.unpack_from(content, place)
        following = place + _CHUNK.size + length + 4
        if kind in _TEXT_CHUNKS:
            text = content[place + _CHUNK.size : following - 4]
            keyword = text.partition(b"\0")[0]
            if keyword not in _TURNED or keyword in names or _is_long(kind, text):
                kept.append(content[start:place])
                start = following
            names.add(keyword)
        place = following
    return b"".join([*kept, content[start:]]) if kept else content


def _is_long(kind: bytes, text: bytes) -> bool:
    """Whether PIL would refuse a PNG because of this chunk."""
    packed = text.partition(b"\0")[2]
    if kind == b"tEXt":
        return False
    if kind == b"iTXt":
        if packed[:1] != b"\1":
            return False
        packed = packed[2:].split(b"\0", 2)[-1]  # behind two flags, language and translated keyword
    else:
        packed = packed[1:]
    unpack = zlib.decompressobj()
    try:
        unpack.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return True
    return bool(unpack.unconsumed_tail)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads an image file completely and turns it into upright RGB, see `decode`; up to PIL's hard limit of pixels.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: when the file is no image, or a damaged one.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no image file {os.fspath(path)!r}; check the path.")
    limit = Image.MAX_IMAGE_PIXELS
    return decode(Path(path), max_pixels=2 * limit if limit else None)  # PIL warns of half of what it refuses


class UnknownRange(ValueError):
    """The numbers of a picture lie where it cannot be told which of them is white."""


def upright_rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF rotation, lays transparency on white, and converts any mode to RGB.

    Raises:
      UnknownRange: for numbers that are neither 0 to 1, nor whole and 0 to 255 or 0 to 65535.
    """
    image = ImageOps.exif_transpose(_as_bytes(image))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# Tags of a TIFF: bits of a number, and whether 0 is white (0) or black (1).
_BITS, _PHOTOMETRIC = 258, 262


def _as_bytes(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits as 0..255; PIL would clip them, so that 16-bit scans turn white and fractions black."""
    if not (image.mode.startswith("I;16") or image.mode in ("I", "F")):
        return image
    image.load()
    grey, tags = np.asarray(image, np.float64 if image.mode == "I" else np.float32), getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") and image.format:  # of a file
        top = 2.0 ** int(np.max(tags.get(_BITS, 16))) - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # PIL scales a PPM to 16 bits
        top = 65535.0
    else:
        top = _white(grey, image.mode == "F")
    shown = np.clip(grey * (255.0 / top), 0, 255).round().astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # which PIL sees to for 8 bits only
        shown = 255 - shown
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        shown[grey == clear] = 255
    made = Image.fromarray(shown)
    made.info.update((key, value) for key, value in image.info.items() if key != "transparency")
    made.getexif().update(image.getexif())
    return made


def _white(grey: np.ndarray, fractions: bool) -> float:
    """Which number is white, by the range of all."""
    low, high = grey.min(initial=0), grey.max(initial=0)
    if not np.isfinite(grey).all():
        raise UnknownRange("its numbers are NaN or infinite in places; clean it, or save it with 8 bits.")
    if low >= 0 and fractions and high <= 1:
        return 1.0
    if low >= 0 and high <= 65535 and (grey == np.floor(grey)).all():
        return 255.0 if high <= 255 else 65535.0
    raise UnknownRange(
        f"its numbers span {low:.6g} to {high:.6g}, which is neither 0 to 1 nor whole and 0 to 255 or 65535; save it with 8 bits."
    )


def to_pil(image: Any) -> Image.Image:
    """Accepts a PIL image, a path, or an array and returns upright RGB.

    Args:
      image: `PIL.Image`, path, or array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; uint8 in 0..255 or float in 0..1.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: when an array has another shape, type or range, or a file is no sound picture.
    """
    if isinstance(image, Image.Image):
        try:
            return upright_rgb(image)
        except (OSError, SyntaxError) as error:  # of a file that PIL opened and had not read yet
            raise ValueError(f"The picture cannot be decoded ({_one_line(error)}); give a sound one.") from error
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


# A picture that is not decoded yet: a file, a file's bytes, or pixels uint8 [H, W, 3].
Encoded = Path | bytes | np.ndarray


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is a short slug to count by ('not-json'), the message one sentence."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # both arguments survive the way back from a worker process
        return BadRecord, (self.reason, str(self))
