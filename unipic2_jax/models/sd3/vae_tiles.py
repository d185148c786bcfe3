"""Large pictures through the VAE in overlapping tiles, whose seams are blended: memory is bounded by a tile's, not the picture's.

The arithmetic is that of diffusers' `AutoencoderKL.enable_tiling`: a quarter of a tile overlaps the next one, and each tile is
normalised, and attends, for itself alone. A picture made of tiles is therefore near the picture made at once, and not equal to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.models.sd3.vae import AutoencoderKL, map_chunked, split_moments

OVERLAP = 0.25


def encode_tiled(
    module: AutoencoderKL, params: Any, images: jax.Array, tile: int, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`AutoencoderKL.encode` by tiles.

    Args:
      images: [B, H, W, 3] in [-1, 1].
      tile: edge of a tile in pixels, a multiple of four latent pixels.
      chunk: tiles in memory at a time.

    Returns:
      mean and log-variance, each float32 [B, h, w, C].

    Raises:
      ValueError: for a tile of another size.
    """
    size = _latent_tile(module, tile)
    moments = lambda x: module.apply({"params": params}, x, method="moments")
    return split_moments(_map_tiled(moments, images, tile, size, chunk))


def decode_tiled(module: AutoencoderKL, params: Any, latents: jax.Array, tile: int, chunk: int) -> jax.Array:
    """`AutoencoderKL.decode` by tiles: latents [B, h, w, C] -> images float32 [B, H, W, 3]. Arguments, errors: `encode_tiled`."""
    size = _latent_tile(module, tile)
    decode = lambda z: module.apply({"params": params}, z, method="decode")
    return _map_tiled(decode, latents, size, tile, chunk)


def _latent_tile(module: AutoencoderKL, tile: int) -> int:
    factor = module.config.downsampling
    if tile < 1 or tile % (4 * factor):
        raise ValueError(f"A tile of the VAE is {tile} pixels wide; it must be a multiple of {4 * factor}.")
    return tile // factor


def _map_tiled(
    function: Callable[[jax.Array], jax.Array], array: jax.Array, tile: int, made: int, chunk: int
) -> jax.Array:
    """What `function` makes of [B, H, W, C] by tiles of this edge, of each of which it makes one with the edge `made`."""
    stride, blended = int(tile * (1 - OVERLAP)), int(made * OVERLAP)
    height, width = array.shape[1:3]
    rows, columns = range(0, height, stride), range(0, width, stride)
    # The last of a row or column are smaller. Tiles of one size are one program.
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for top in rows:
        for left in columns:
            sizes.setdefault((min(tile, height - top), min(tile, width - left)), []).append((top, left))
    done: dict[tuple[int, int], jax.Array] = {}
    for (high, wide), places in sizes.items():
        stacked = jnp.concatenate([array[:, top : top + high, left : left + wide] for top, left in places])
        done |= zip(places, jnp.split(map_chunked(function, stacked, chunk), len(places)))
    kept = made - blended
    for top in rows:
        for left in columns:
            # Into tiles that are blended themselves already, from above first, as in the original.
            if top:
                done[top, left] = _blend(done[top - stride, left], done[top, left], blended, axis=1)
            if left:
                done[top, left] = _blend(done[top, left - stride], done[top, left], blended, axis=2)
    return jnp.concatenate(
        [jnp.concatenate([done[top, left][:, :kept, :kept] for left in columns], axis=2) for top in rows], axis=1
    )


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """`after` with its first `extent` rows (axis 1) or columns (axis 2) faded in over the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    shape = [1] * 4
    shape[axis] = extent
    weight = (jnp.arange(extent, dtype=jnp.float32) / extent).reshape(shape)
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    new = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, after.shape[axis], axis=axis)
    return jnp.concatenate([old * (1 - weight) + new * weight, rest], axis=axis)
