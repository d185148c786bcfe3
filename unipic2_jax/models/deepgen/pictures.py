"""How DeepGen shows the vision tower a picture: the pixels of its latents, made smaller between neighbours and no further.

Original: `get_semantic_features_dynamic` and `get_semantic_features` (deepgenteam/deepgen), PyTorch's bilinear `interpolate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange, repeat
from PIL import Image


@dataclasses.dataclass(frozen=True)
class TowerPictures:
    """Stands for transformers' image processor in a `VLMProcessor`; a picture keeps its own size.

    Attributes:
      scale: edges of what the tower sees, in parts of the picture's.
      patch_size, merge_size, temporal_patch_size: of the tower.
      mean, std: of the three colours.
    """

    scale: float
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Sequence[Image.Image], **options: Any) -> dict[str, np.ndarray]:
        """Patches of all pictures [N, C * frames * p * p] in the tower's order, and their grids int [I, 3].

        Options of transformers' (the kind of arrays, limits on sizes) change nothing.

        Raises:
          ValueError: for a picture whose edges do not become whole tokens.
        """
        del options
        made = [self._patches(picture) for picture in images]
        patches, grids = zip(*made)
        return {"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids)}

    def _patches(self, picture: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        token = self.patch_size * self.merge_size
        width, height = (int(edge * self.scale) for edge in picture.size)
        if width < token or height < token or width % token or height % token:
            raise ValueError(
                f"A picture of {picture.width} x {picture.height} pixels does not divide into tokens of {token} pixels at a scale of "
                f"{self.scale:g}; make both edges multiples of {token / self.scale:g}."
            )
        pixels = np.asarray(picture, np.float32) / 255
        pixels = between_neighbours(between_neighbours(pixels, 1, width, self.scale), 0, height, self.scale)
        pixels = ((pixels - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
        merge, patch = self.merge_size, self.patch_size
        flat = rearrange(pixels, "(h m p) (w n q) c -> (h w m n) c p q", m=merge, n=merge, p=patch, q=patch)
        frames = repeat(flat, "s c p q -> s (c t p q)", t=self.temporal_patch_size)
        return frames, (1, height // patch, width // patch)


def between_neighbours(pixels: np.ndarray, axis: int, wanted: int, scale: float) -> np.ndarray:
    """Linear interpolation of a float32 picture to so many pixels along an axis, which are squares, without smoothing, as PyTorch's."""
    count = pixels.shape[axis]
    place = np.clip((np.arange(wanted) + 0.5) / scale - 0.5, 0, count - 1)
    first = np.floor(place).astype(int)
    part = (place - first).astype(np.float32).reshape(-1, *(1,) * (pixels.ndim - 1 - axis))
    one, other = (np.take(pixels, index, axis=axis) for index in (first, np.minimum(first + 1, count - 1)))
    return (1 - part) * one + part * other
