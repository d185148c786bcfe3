"""Pictures on their way to Qwen2.5-VL's tower: 8 bits on the host and between host and device, patches of floats in the program.

Original: transformers' `Qwen2VLImageProcessorPil`. Its resizing is PIL's, its arithmetic maps each of 256 levels of a colour to one
float, and its patches hold a still picture once for each of the tower's frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from PIL import Image

from unipic2_jax.pictures import bicubic

LEVELS = 256


@dataclasses.dataclass(frozen=True)
class Look:
    """How an image processor shows the tower a picture.

    Attributes:
      patch_size, merge_size, frames: of the tower's patches.
      table: bytes of float32 [3, 256], what each level of a colour becomes.
    """

    patch_size: int
    merge_size: int
    frames: int
    table: bytes

    @classmethod
    def of(cls, processor: Any) -> Self | None:
        """That of transformers' image processor; None for a stand-in that makes floats of its own, or one that does not resize as PIL's
        bicubic filter does."""
        if getattr(processor, "resample", None) != Image.Resampling.BICUBIC or not processor.do_resize:
            return None
        values: Any = np.broadcast_to(np.arange(LEVELS, dtype=np.uint8), (3, 1, LEVELS))
        if processor.do_rescale:
            values = processor.rescale(values, processor.rescale_factor)
        if processor.do_normalize:
            values = processor.normalize(values, processor.image_mean, processor.image_std)
        table = np.ascontiguousarray(values, np.float32).tobytes()
        return cls(processor.patch_size, processor.merge_size, processor.temporal_patch_size, table)

    @property
    def token(self) -> int:
        """Pixels along the edge of a merged token."""
        return self.patch_size * self.merge_size

    @property
    def patch_levels(self) -> int:
        """Numbers of a patch of one frame."""
        return 3 * self.patch_size**2

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """(frames, height, width) in patches of a still picture of this size, whose edges are whole tokens."""
        return 1, height // self.patch_size, width // self.patch_size

    def patches(self, pixels: Any) -> Any:
        """Pictures [..., H, W, 3] in patches of one frame [..., N, 3 * p * p], neighbours that are merged side by side; of NumPy or JAX."""
        *lead, height, width, _ = pixels.shape
        p, m = self.patch_size, self.merge_size
        cut = pixels.reshape(-1, height // (m * p), m, p, width // (m * p), m, p, 3)
        return rearrange(cut, "b h m p w n q c -> b (h w m n) (c p q)").reshape(*lead, -1, self.patch_levels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels:
    """The patches of a `VisionInput` before they are floats. The batch leads every array.

    Attributes:
      windows: uint8 [B, W, S, 3 * p * p], the patches that the host made; None: it made none.
      pixels: pictures as they came, uint8 [B, H, W, 3] each, which the program resizes; no more than a few sizes, since each compiles.
      index: int32 [B, W, S], which patch of the resized pictures, one behind the other, stands in a slot; -1: none. None without `pixels`.
      sizes: (height, width) of what the tower sees of each of `pixels`.
      look: see `Look`.
    """

    windows: Any
    pixels: tuple[Any, ...]
    index: Any
    sizes: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    look: Look = dataclasses.field(metadata={"static": True})

    def padded(self, behind: int) -> Levels:
        """With so many empty windows more; on the host."""
        widths = ((0, 0), (0, behind), (0, 0))
        windows = None if self.windows is None else np.pad(self.windows, (*widths, (0, 0)))
        index = None if self.index is None else np.pad(self.index, widths, constant_values=-1)
        return dataclasses.replace(self, windows=windows, index=index)

    def patches(self, frames: Any) -> jax.Array:
        """The floats that the image processor makes, [B, W, S, 3 * frames * p * p]; zeros in empty slots.

        Args:
          frames: of the `VisionInput`; 0 is an empty slot.
        """
        levels: Any = None if self.windows is None else jnp.asarray(self.windows)
        if self.pixels:
            shown = [self.look.patches(bicubic.resized(x, *size)) for x, size in zip(self.pixels, self.sizes)]
            index = jnp.asarray(self.index)
            place = jnp.maximum(index, 0).reshape(len(index), -1, 1)
            taken = jnp.take_along_axis(jnp.concatenate(shown, axis=1), place, axis=1).reshape(*index.shape, -1)
            levels = taken if levels is None else jnp.where(index[..., None] >= 0, taken, levels)
        table = np.frombuffer(self.look.table, np.float32)
        colour = np.arange(self.look.patch_levels) // self.look.patch_size**2
        values = jnp.take(table, levels.astype(jnp.int32) + LEVELS * colour, axis=0)
        values = jnp.where((jnp.asarray(frames) > 0)[..., None], values, 0.0)
        return repeat(values, "b w s (c n) -> b w s (c t n)", c=3, t=self.look.frames)


@functools.lru_cache(maxsize=4096)
def seen_size(size: tuple[int, int], token: int, limits: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which the tower sees a picture of this (height, width), within so many pixels at least and at most."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    return smart_resize(*size, factor=token, min_pixels=limits[0], max_pixels=limits[1])


def host_patches(picture: Image.Image, size: tuple[int, int], look: Look) -> np.ndarray:
    """A picture resized to (height, width) and cut by the host: uint8 [N, 3 * p * p]."""
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return look.patches(np.asarray(picture))


def resizable(pictures: Sequence[Image.Image], seen: tuple[int, int]) -> bool:
    """Whether these can be resized by one program: they have one size, and Pillow's way with it is known."""
    first = pictures[0].size
    return all(picture.size == first for picture in pictures) and bool(bicubic.order(*first[::-1], *seen))
