"""PIL's bicubic resizing inside a program, equal to the level.

Original: Pillow's `src/libImaging/Resample.c`, whose 8-bit pictures are resized in whole numbers: weights of 22 bits, one pass along
the rows and one along the columns, each rounded to 8 bits. Whole numbers have no rounding of their own, so that devices agree.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

BITS = 22  # of a weight behind the point
SUPPORT = 2.0  # pixels that the filter reaches to either side, before it is widened to smooth what becomes smaller
A = -0.5  # of the cubic filter


def cubic(x: np.ndarray) -> np.ndarray:
    """The filter at distances of so many pixels."""
    x = np.abs(x)
    near, far = ((A + 2) * x - (A + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * A
    return np.where(x < 1, near, np.where(x < SUPPORT, far, 0.0))


@functools.lru_cache(maxsize=256)
def weights(count: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of the `wanted` pixels begins to read among `count`, int [wanted], and its weights, int32 [wanted, K]."""
    scale = count / wanted
    wide = max(scale, 1.0)
    center = (np.arange(wanted) + 0.5) * scale
    first = np.maximum((center - SUPPORT * wide + 0.5).astype(int), 0)
    last = np.minimum((center + SUPPORT * wide + 0.5).astype(int), count)
    place = np.arange(math.ceil(SUPPORT * wide) * 2 + 1)
    shares = cubic((place + first[:, None] - center[:, None] + 0.5) / wide)
    shares = np.where(place < (last - first)[:, None], shares, 0.0)
    shares *= 1 / shares.sum(axis=1, keepdims=True)
    fixed = np.trunc(shares * 2**BITS + np.where(shares < 0, -0.5, 0.5)).astype(np.int32)
    used = np.flatnonzero(fixed.any(axis=0)).max(initial=0) + 1
    return first, fixed[:, :used]


@functools.lru_cache(maxsize=256)
def order(height: int, width: int, new_height: int, new_width: int) -> tuple[int, ...]:
    """Which axis the installed Pillow resizes first, of pictures that become so large: that differs between its versions. Asked by a
    picture of noise. Empty: its results are neither, and pictures have to be resized by Pillow itself.
    """
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    theirs = np.asarray(Image.fromarray(noise).resize((new_width, new_height), Image.Resampling.BICUBIC))
    for axes in ((-2, -3), (-3, -2)):
        if np.array_equal(_resized(noise, new_height, new_width, axes), theirs):
            return axes
    return ()


def resized(pixels: jax.Array, height: int, width: int) -> jax.Array:
    """Pictures uint8 [..., H, W, C] at this size, as `PIL.Image.resize(..., BICUBIC)` has them; may be jitted.

    Raises:
      ValueError: when the installed Pillow has no such order (`order`).
    """
    if not (axes := order(*pixels.shape[-3:-1], height, width)):
        raise ValueError(
            f"The installed Pillow resizes pictures of {pixels.shape[-2]} x {pixels.shape[-3]} pixels in a way that is not known "
            "here; install another version of it."
        )
    return _resized(pixels, height, width, axes)


def _resized(pixels: Any, height: int, width: int, axes: tuple[int, ...]) -> Any:
    sizes = {-2: width, -3: height}
    for axis in axes:
        if pixels.shape[axis] != sizes[axis]:
            pixels = _along(pixels, axis, sizes[axis])
    return pixels


def _along(pixels: Any, axis: int, wanted: int) -> Any:
    """One pass, of NumPy or, inside a program, of JAX."""
    on_host = isinstance(pixels, np.ndarray)
    take, clip = (np.take, np.clip) if on_host else (jnp.take, jnp.clip)
    first, shares = weights(pixels.shape[axis], wanted)
    last, behind = pixels.shape[axis] - 1, (1,) * (-1 - axis)
    total: Any = np.int32(2 ** (BITS - 1))
    for tap in range(shares.shape[1]):
        read = take(pixels, np.minimum(first + tap, last), axis=axis).astype(np.int32)
        total = total + read * shares[:, tap].reshape(-1, *behind)
    return clip(total >> BITS, 0, 255).astype(np.uint8)
