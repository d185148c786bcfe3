"""Qwen2.5-VL's vision tower. Original: `transformers.models.qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel`.

Most blocks attend within windows, a few within a whole frame. Here patches are laid out in windows from the start, with
empty slots where a window reaches over the edge of its image, so that window attention is a reshape and every shape is
static whatever the sizes of the images are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from unipic2_jax.models.attention import attention
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.lora import LoRADense
from unipic2_jax.models.qwen.pictures import Levels
from unipic2_jax.models.remat import stacked
from unipic2_jax.parallel.rules import constrain

EPS = 1e-6
ROPE_THETA = 10000.0
# At the width of 7B about transformers' 0.02; a narrow model would hardly start to learn with that.
KERNEL_INIT = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLVisionConfig(ModelConfig):
    """Sizes under transformers' field names; the defaults are those of the 7B model.

    Raises:
      ValueError: at construction, when the fields contradict each other.
    """

    CLASS_NAME = "Qwen2_5_VLVisionConfig"
    MODEL_TYPE = "qwen2_5_vl"

    FOREIGN: ClassVar[Mapping[str, Any]] = {"in_chans": int}

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_second: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        if self.hidden_act != "silu":
            raise ValueError(f"The vision tower's hidden_act {self.hidden_act!r} is not supported; use 'silu'.")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"The vision tower's hidden_size {self.hidden_size} does not split into {self.num_heads} heads of a "
                "multiple of 4; change one of the two."
            )
        if self.window_edge < 1:
            raise ValueError(
                f"window_size {self.window_size} is less than one merged token of {self.patch_size} x "
                f"{self.spatial_merge_size} pixels; enlarge it."
            )
        if any(not 0 <= block < self.depth for block in self.fullatt_block_indexes):
            raise ValueError(
                f"fullatt_block_indexes {self.fullatt_block_indexes} name blocks beyond the {self.depth} that there are."
            )

    @classmethod
    def adapted(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Published files say `in_chans`."""
        return {"in_channels": values.get("in_chans", cls.in_channels), **values}

    @property
    def window_edge(self) -> int:
        """Merged tokens along the edge of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def merged(self) -> int:
        """Patches in a merged token."""
        return self.spatial_merge_size**2

    @property
    def window_slots(self) -> int:
        """Patches in a window."""
        return self.window_edge**2 * self.merged

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch: channels x frames x height x width, in this order."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


# On the host NumPy's, in a program JAX's.
Array = jax.Array | np.ndarray


class VisionInput(NamedTuple):
    """The images and videos of a batch of prompts, laid out in windows: W windows of S slots a prompt.

    Attributes:
      patches: float [B, W, S, patch_dim], zeros in empty slots; or what the program makes them of.
      places: int [B, W, S, 2], row and column of each patch in its frame.
      frames: int [B, W, S], which frame a patch is of, from 1; 0: an empty slot.
      tokens: int [B, T], for each place of the prompt the merged token that stands there, an index into the
        W * S / merged of its row; -1: text.
    """

    patches: Array | Levels
    places: Array
    frames: Array
    tokens: Array


class VisionTokens(NamedTuple):
    """What the tower made of a `VisionInput`, kept: a tower that is not trained need not see the same pictures again.

    Attributes:
      features: [B, N, out_hidden_size], the tower's merged tokens.
      tokens: as of `VisionInput`.
    """

    features: Array
    tokens: Array


def window_order(config: Qwen2_5_VLVisionConfig, grid: Sequence[int]) -> np.ndarray:
    """Which merged token stands where in the windows of one image or video: int [W, window_edge ** 2], -1 is empty.

    Args:
      grid: (frames, height, width) in patches; height and width are multiples of spatial_merge_size.
    """
    edge, merge = config.window_edge, config.spatial_merge_size
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    index = np.arange(frames * height * width, dtype=np.int32).reshape(frames, height, width)
    index = np.pad(index, ((0, 0), (0, -height % edge), (0, -width % edge)), constant_values=-1)
    return rearrange(index, "t (h p) (w q) -> (t h w) (p q)", p=edge, q=edge)


class Layout(NamedTuple):
    """Where the images and videos of a batch stand in windows.

    Attributes:
      source: int [B, W, S], which patch of its row stands in a slot, the row's images one behind the other; -1: none.
      places, frames, tokens: as of `VisionInput`.
      used: the images of each row, as (placeholder id, number among those of that id).
    """

    source: np.ndarray
    places: np.ndarray
    frames: np.ndarray
    tokens: np.ndarray
    used: list[list[tuple[int, int]]]


def lay_out(
    config: Qwen2_5_VLVisionConfig,
    input_ids: np.ndarray,
    grids: Mapping[int, np.ndarray],
    windows: int | None = None,
) -> Layout:
    """Lays the images and videos of a batch out in windows, on the host; arguments and errors as `pack_images`.

    Args:
      grids: placeholder id -> int [I, 3], (frames, height, width) of all its images in patches.
    """
    queues = {token: iter(enumerate(np.asarray(all_grids, int).tolist())) for token, all_grids in grids.items()}
    rows = [_lay_out_row(config, row, np.asarray(ids), queues) for row, ids in enumerate(input_ids)]
    if left := sum(1 for queue in queues.values() for _ in queue):
        raise ValueError(f"{left} image(s) have no image tokens in the prompts; add a placeholder for each.")
    needed = max(len(row.frames) for row in rows)
    if windows is not None and needed > windows:
        raise ValueError(f"The images of a prompt fill {needed} windows but {windows} are reserved; reserve more.")
    windows = needed if windows is None else windows
    source = np.full((len(rows), windows, config.window_slots), -1, np.int32)
    places, frames = np.zeros((*source.shape, 2), np.int32), np.zeros(source.shape, np.int32)
    for i, row in enumerate(rows):
        for whole, part in ((source, row.source), (places, row.places), (frames, row.frames)):
            whole[i, : len(part)] = part
    return Layout(source, places, frames, np.stack([row.tokens for row in rows]), [row.used[0] for row in rows])


def pack_images(
    config: Qwen2_5_VLVisionConfig,
    input_ids: np.ndarray,
    media: Mapping[int, tuple[np.ndarray, np.ndarray]],
    windows: int | None = None,
) -> VisionInput:
    """Lays the images and videos of a batch out in windows, on the host.

    Args:
      input_ids: int [B, T].
      media: placeholder id (`image_token_id`, `video_token_id`) -> what the image processor gave: the patches of all
        its images in the order in which the batch names them, float [N, patch_dim], and their grids, int [I, 3].
      windows: W; None: as many as the fullest row needs. A fixed number keeps one compiled program for all prompts.

    Raises:
      ValueError: when a prompt's placeholders do not match its images, or the images need more than `windows`.
    """
    images = {token: _split(config, *arrays) for token, arrays in media.items()}
    layout = lay_out(config, input_ids, {token: grids for token, (_, grids) in media.items()}, windows)
    patches = np.zeros((*layout.source.shape, config.patch_dim), np.float32)
    for row, used in enumerate(layout.used):
        if used:
            fill(patches[row], layout.source[row], [images[token][number] for token, number in used])
    return VisionInput(patches, layout.places, layout.frames, layout.tokens)


def fill(windows: np.ndarray, source: np.ndarray, images: Sequence[np.ndarray]) -> None:
    """Writes the patches [N, D] of a row's images into its windows [W, S, D], where `source` [W, S] says."""
    filled = source >= 0
    windows[filled] = np.concatenate(images)[source[filled]]


def _split(config: Qwen2_5_VLVisionConfig, patches: np.ndarray, grids: np.ndarray) -> list[np.ndarray]:
    """The patches of one image after the other."""
    ends = np.cumsum(np.prod(np.asarray(grids, int), axis=-1))
    if patches.ndim != 2 or len(patches) != (ends[-1] if len(ends) else 0) or patches.shape[1] != config.patch_dim:
        raise ValueError(
            f"Image patches of shape {patches.shape} do not fit the grids, which need {[int(ends[-1]), config.patch_dim]}; "
            "pass what the image processor gave."
        )
    return np.split(patches, ends[:-1])


def _lay_out_row(config: Qwen2_5_VLVisionConfig, row: int, ids: np.ndarray, queues: Mapping[int, Iterator]) -> Layout:
    """One prompt's images, one behind the other, without the batch axis."""
    none = np.zeros((0, config.window_slots), np.int32)
    pieces = [(none, np.stack([none, none], axis=-1), none)]
    tokens, used = np.full(len(ids), -1, np.int32), []
    placeholders, windows, frames, patches = np.flatnonzero(np.isin(ids, list(queues))), 0, 0, 0
    while len(placeholders):
        first = placeholders[0]
        token = int(ids[first])
        if (image := next(queues[token], None)) is None:
            raise ValueError(f"Prompt {row} has more image tokens than images; give one image for each placeholder.")
        number, grid = image
        count = math.prod(grid) // config.merged
        run = ids[first : first + count]
        if len(run) < count or (run != token).any():
            raise ValueError(
                f"Prompt {row} has {len(placeholders)} image tokens left where an image of {' x '.join(map(str, grid))} "
                f"patches needs {count} in a row; let the processor insert them."
            )
        where, source, places, frame = _one_image(config, tuple(grid))
        tokens[first : first + count] = where + windows * config.window_edge**2
        empty = source < 0
        pieces.append((np.where(empty, -1, source + patches), places, np.where(empty, 0, frame + frames)))
        used.append((token, number))
        placeholders, windows = placeholders[count:], windows + len(source)
        frames, patches = frames + grid[0], patches + math.prod(grid)
    source, places, frame = (np.concatenate(parts) for parts in zip(*pieces))
    return Layout(source, places, frame, tokens, [used])


@functools.lru_cache(maxsize=256)
def _one_image(
    config: Qwen2_5_VLVisionConfig, grid: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of an image with this grid: where each merged token stands [N / merged], and by slot [W, S] its patch (-1: none), place and frame."""
    order = window_order(config, grid)
    filled = order.reshape(-1) >= 0
    where = np.empty(math.prod(grid) // config.merged, np.int32)
    where[order.reshape(-1)[filled]] = np.flatnonzero(filled)
    source = (order[..., None] * config.merged + np.arange(config.merged)).reshape(len(order), -1)
    empty = np.repeat(order < 0, config.merged, axis=-1)
    source = np.where(empty, -1, source).astype(np.int32)
    places = np.where(empty[..., None], 0, patch_places(config, grid)[source]).astype(np.int32)
    frame = np.where(empty, 0, source // (grid[1] * grid[2]) + 1).astype(np.int32)
    return where, source, places, frame


def patch_places(config: Qwen2_5_VLVisionConfig, grid: Sequence[int]) -> np.ndarray:
    """Row and column of every patch of one image or video in the processor's order, where merged patches are neighbours."""
    merge = config.spatial_merge_size
    places = np.stack([*np.mgrid[: grid[1], : grid[2]]], axis=-1).astype(np.int32)
    places = rearrange(places, "(h p) (w q) two -> (h w p q) two", p=merge, q=merge)
    return np.tile(places, (grid[0], 1))


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotary positions in float32: x [..., D] turned by angle [..., D / 2]; halves are paired, as in NeoX."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), [..., D] -> [..., D]."""

    features: int
    use_bias: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(
            LoRADense,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=KERNEL_INIT,
        )
        gate = jax.nn.silu(dense(self.features, name="gate_proj")(x))
        return dense(x.shape[-1], name="down_proj")(gate * dense(self.features, name="up_proj")(x))


class VisionBlock(nn.Module):
    """A pre-norm block on windows of patches, [B, W, S, D] -> the same; `full` widens its attention to whole frames."""

    config: Qwen2_5_VLVisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, full: jax.Array, angle: jax.Array, frames: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.RMSNorm, epsilon=EPS, **kinds)
        dense = functools.partial(nn.Dense, kernel_init=KERNEL_INIT, **kinds)
        x = constrain(x, "batch", "sequence", None, None)  # by windows
        qkv = dense(3 * c.hidden_size, name="qkv")(norm(name="norm1")(x))
        query, key, value = rearrange(qkv, "b w s (three n d) -> three b w s n d", three=3, n=c.num_heads)
        query, key = rotate(query, angle), rotate(key, angle)

        def within_windows(*arrays: jax.Array) -> jax.Array:
            flat = (rearrange(a, "b w s n d -> (b w) s n d") for a in arrays)
            mask = rearrange(frames > 0, "b w s -> (b w) 1 1 s")
            return attention(*flat, mask=mask, network="Qwen2.5-VL vision").reshape(query.shape)

        def within_frames(*arrays: jax.Array) -> jax.Array:
            flat = (rearrange(a, "b w s n d -> b (w s) n d") for a in arrays)
            frame = rearrange(frames, "b w s -> b 1 (w s)")
            same = frame[..., None] == frame[..., None, :]
            return attention(*flat, mask=same, network="Qwen2.5-VL vision").reshape(query.shape)

        mixed = jax.lax.cond(full, within_frames, within_windows, query, key, value)
        x = x + dense(c.hidden_size, name="proj")(mixed.reshape(x.shape))
        x = x + GatedMLP(c.intermediate_size, True, **kinds, name="mlp")(norm(name="norm2")(x))
        return x, None


class VisionTower(nn.Module):
    """Patches to merged tokens of the language model's width. Parameters of the blocks are stacked."""

    config: Qwen2_5_VLVisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, vision: VisionInput) -> jax.Array:
        """-> [B, W * S / merged, out_hidden_size]; `VisionInput.tokens` indexes its second axis."""
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patches = vision.patches.patches(vision.frames) if isinstance(vision.patches, Levels) else vision.patches
        x = PatchEmbed(c, **kinds, name="patch_embed")(patches)
        # Half of a head's frequencies turn with the row, half with the column.
        count = c.hidden_size // c.num_heads // 4
        frequencies = ROPE_THETA ** -(np.arange(count, dtype=np.float32) / count)
        angle = rearrange(vision.places[..., None] * frequencies, "b w s two f -> b w s 1 (two f)")
        full = np.isin(np.arange(c.depth), c.fullatt_block_indexes)
        blocks = stacked(VisionBlock, self.remat, c.depth, in_axes=(0, nn.broadcast, nn.broadcast))
        x, _ = blocks(c, **kinds, name="blocks")(x, full, angle, vision.frames)
        x = nn.RMSNorm(epsilon=EPS, **kinds, name="merger_norm")(x)
        x = rearrange(x, "b w (m k) d -> b (w m) (k d)", k=c.merged)
        dense = functools.partial(nn.Dense, kernel_init=KERNEL_INIT, **kinds)
        x = jax.nn.gelu(dense(x.shape[-1], name="merger_fc1")(x), approximate=False)
        return dense(c.out_hidden_size, name="merger_fc2")(x)


class PatchEmbed(nn.Module):
    """The 3-D convolution whose stride is its kernel, as one matrix product: [..., patch_dim] -> [..., hidden_size]."""

    config: Qwen2_5_VLVisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        c = self.config
        shape = (c.temporal_patch_size, c.patch_size, c.patch_size, c.in_channels, c.hidden_size)
        kernel = self.param("kernel", KERNEL_INIT, shape, self.param_dtype).astype(self.dtype)
        return patches.astype(self.dtype) @ rearrange(kernel, "t p q c d -> (c t p q) d")
