"""Reads an image of the shapes world back into a scene: segmentation by colour, then classification of the mask.

Exact on clean renders; what a VAE's blur costs is measured by `launch.evaluate --suite=shapes --reconstruct`.
Whatever covers a cell without looking like an object of the world is an object of class 'unknown', so that smears,
half objects and objects off the grid count as extras instead of passing unseen.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange

from unipic2_jax.shapes.world import BACKGROUNDS, CELL, COLORS, GRID, IMAGE_SIZE, Scene, Thing, templates

UNKNOWN = "unknown"
# A pixel belongs to an object when it lies this far (RGB, Euclidean) from the background ...
MIN_CONTRAST = 45.0
# ... and a cell holds an object when so many pixels do: the smallest object covers 50.
MIN_PIXELS = 10
# Pixels from which an object's colour is taken: its strongest, which blur touches least.
CORE_PIXELS = 16
# Overlap with the best template below which a coverage is no object of this world.
MIN_OVERLAP = 0.7
# Distance (RGB, Euclidean) to the nearest named colour beyond which a colour is none of them.
MAX_COLOR_DISTANCE = 60.0


def _nearest(colors: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """[N, 3] -> [N] names, `UNKNOWN` where nothing is near."""
    names = np.asarray([*palette, UNKNOWN], dtype=object)
    distance = np.linalg.norm(colors[:, None] - np.asarray(list(palette.values()), np.float32), axis=-1)
    return names[np.where(distance.min(axis=1) <= MAX_COLOR_DISTANCE, distance.argmin(axis=1), len(palette))]


def read_scenes(images: np.ndarray) -> list[Scene]:
    """uint8 [N, IMAGE_SIZE, IMAGE_SIZE, 3] -> N scenes, whose objects may have 'unknown' attributes.

    Raises:
      ValueError: when the images have another size.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"The shapes verifier reads images of {IMAGE_SIZE} x {IMAGE_SIZE} x 3, not {images.shape[1:]}; generate at that size."
        )
    cells = rearrange(images.astype(np.float32), "n (r y) (c x) d -> n (r c) (y x) d", r=GRID, c=GRID, y=CELL, x=CELL)
    # Objects leave the outermost pixel of their cell free, so the rim of all cells shows the background.
    edge = np.zeros((CELL, CELL), bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    rim = rearrange(cells[:, :, edge.reshape(-1)], "n k p d -> n (k p) d")
    background_rgb = np.median(rim, axis=1)
    backgrounds = _nearest(background_rgb, BACKGROUNDS)

    offset = cells - background_rgb[:, None, None]  # [n, k, p, rgb]
    contrast = np.linalg.norm(offset, axis=-1)
    occupied = (contrast > MIN_CONTRAST).sum(axis=-1) >= MIN_PIXELS
    offset, contrast = offset[occupied], contrast[occupied]

    strongest = np.argsort(-contrast, axis=-1)[:, :CORE_PIXELS, None]
    object_offset = np.median(np.take_along_axis(offset, strongest, axis=1), axis=1)
    colors = _nearest(object_offset + np.repeat(background_rgb, occupied.sum(axis=1), axis=0), COLORS)

    # How much of each pixel the object covers, and how far the pixel is from any mixture of object and background.
    length = np.linalg.norm(object_offset, axis=-1)[:, None] + 1e-6
    cover = np.clip(np.einsum("kpd,kd->kp", offset, object_offset) / length**2, 0, 1)
    stray = np.linalg.norm(offset - cover[..., None] * object_offset[:, None], axis=-1) / length
    keys = list(templates())
    shapes = np.stack([templates()[key].reshape(-1) for key in keys])
    overlap = np.minimum(cover[:, None], shapes).sum(axis=-1)
    union = np.maximum(cover[:, None], shapes).sum(axis=-1) + np.where(stray > 0.3, stray, 0).sum(axis=-1)[:, None]
    score = overlap / union
    best = score.argmax(axis=1)

    things: list[list[Thing]] = [[] for _ in images]
    for (n, cell), index, fit, color in zip(np.argwhere(occupied), best, score.max(axis=1, initial=0), colors):
        shape, size = keys[index] if fit >= MIN_OVERLAP else (UNKNOWN, UNKNOWN)
        things[n].append(Thing(int(cell), shape, str(color), size))
    return [Scene(str(background), tuple(seen)) for background, seen in zip(backgrounds, things)]
