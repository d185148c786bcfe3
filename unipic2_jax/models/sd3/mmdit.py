"""The MMDiT-X of Stable Diffusion 3.5 with Kontext references (UniPic 2.0 report, section 3.1).

Two token streams, image and text, attend to each other in every block. Reference latents enter the image stream
through the same patch embedding and the same cropped positions as the target: [reference tokens..., target tokens].
The parameters are those of diffusers' `SD3Transformer2DModel`, with the equal blocks stacked along a leading axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from unipic2_jax.models.attention import filler
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.remat import stacked
from unipic2_jax.models.sd3.layers import Block, Compute, Modulation, TwoLayer, dense, layer_norm, modulate

TIME_CHANNELS = 256


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(ModelConfig):
    """Sizes under diffusers' field names; the defaults are SD3.5-Medium.

    Raises:
      ValueError: at construction, when the fields contradict each other.
    """

    CLASS_NAME = "SD3Transformer2DModel"

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 384
    dual_attention_layers: tuple[int, ...] = tuple(range(13))
    qk_norm: str | None = "rms_norm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual_attention_layers", tuple(self.dual_attention_layers))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers} but at least one block is needed.")
        count = len(self.dual_attention_layers)
        if self.dual_attention_layers != tuple(range(count)) or count > self.num_layers:
            raise ValueError(
                f"dual_attention_layers {self.dual_attention_layers} must be the first k of the {self.num_layers} "
                "layers, (0, 1, ..., k-1), because equal blocks are scanned; no released model differs."
            )
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim {self.caption_projection_dim} must equal num_attention_heads * "
                f"attention_head_dim = {self.width}; change one of the three."
            )
        if self.width % 4:
            raise ValueError(f"The width {self.width} must be a multiple of 4 for the sin-cos positions; change it.")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {self.qk_norm!r} is unknown; use 'rms_norm' or None.")

    @property
    def velocity_channels(self) -> int:
        """`out_channels`, which a file may leave out: as many as go in."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @classmethod
    def adapted(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Files older than SD3.5 lack the two newest fields and mean diffusers' defaults for them."""
        return {"dual_attention_layers": (), "qk_norm": None, **values}

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def groups(self) -> dict[str, range]:
        """Which layers live under which top-level name of the parameter tree; the last block stands alone."""
        last = self.num_layers - 1
        dual = min(len(self.dual_attention_layers), last)
        groups = {"dual_blocks": range(dual), "blocks": range(dual, last), "last_block": range(last, last + 1)}
        return {name: layers for name, layers in groups.items() if layers}


def position_table(width: int, grid: int, base: int) -> jax.Array:
    """diffusers' 2-D sin-cos table: [1, grid * grid, width], positions scaled so that `grid` spans `base` units."""
    position = np.arange(grid, dtype=np.float32) / np.float32(grid / base)
    omega = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angle = np.outer(position, omega)
    line = jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1), jnp.float32)
    half = (grid, grid, width // 2)
    # Columns come first, rows second, as in the original.
    table = jnp.concatenate([jnp.broadcast_to(line[None], half), jnp.broadcast_to(line[:, None], half)], axis=-1)
    return table.reshape(1, grid * grid, width)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: patches [..., P, P, C] -> [..., D]."""

    config: MMDiTConfig
    compute: Compute

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        shape, dtype = (*patches.shape[-3:], self.config.width), self.compute.dtype
        init = nn.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param("kernel", init, shape, self.compute.param_dtype).astype(dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], self.compute.param_dtype).astype(dtype)
        flat = rearrange(patches, "... p q c -> ... (p q c)").astype(dtype)
        return flat @ rearrange(kernel, "p q c d -> (p q c) d") + bias


class PatchEmbed(nn.Module):
    """Latents -> tokens, with the centre crop of the position table that fits their grid added."""

    config: MMDiTConfig
    compute: Compute

    def setup(self) -> None:
        config = self.config
        grid, base = config.pos_embed_max_size, config.sample_size // config.patch_size
        # A buffer of the original, kept as a leaf so that checkpoints round-trip; never trained.
        self.table = self.param(
            "pos_embed", lambda _: position_table(config.width, grid, base).astype(self.compute.param_dtype)
        )
        self.proj = PatchProjection(config, self.compute)

    def __call__(self, latents: jax.Array, grids: jax.Array | None = None) -> jax.Array:
        """latents [N, H, W, C]; grids int [N, 2]: each image's own grid in patches (None: all of it) -> [N, S, D]."""
        grid = self.config.pos_embed_max_size
        patch = self.config.patch_size
        tokens = self.proj(rearrange(latents, "n (h p) (w q) c -> n h w p q c", p=patch, q=patch))
        _, height, width, _ = tokens.shape
        table = jax.lax.stop_gradient(self.table).reshape(grid, grid, -1)
        if grids is None:
            top, left = (grid - height) // 2, (grid - width) // 2
            positions = table[top : top + height, left : left + width]
        else:
            start = (grid - grids) // 2
            # Rows and columns beyond an image's own grid are padding: any entry will do.
            rows = jnp.clip(start[:, :1] + jnp.arange(height), 0, grid - 1)
            columns = jnp.clip(start[:, 1:] + jnp.arange(width), 0, grid - 1)
            positions = table[rows[:, :, None], columns[:, None, :]]
        return rearrange((tokens + positions.astype(jnp.float32)).astype(tokens.dtype), "n h w d -> n (h w) d")


class TimeTextEmbed(nn.Module):
    """timestep [B] in 0..1000 and pooled text [B, P] -> one conditioning vector [B, D]."""

    config: MMDiTConfig
    compute: Compute

    @nn.compact
    def __call__(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        frequencies = np.exp(-np.log(10000.0) * np.arange(TIME_CHANNELS // 2) / (TIME_CHANNELS // 2))
        angle = timestep.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        time = TwoLayer(self.config.width, self.compute, name="timestep_embedder")(waves)
        return time + TwoLayer(self.config.width, self.compute, name="text_embedder")(pooled)


class MMDiT(nn.Module):
    """Predicts the flow-matching velocity (noise - data) of latents, given text and any number of reference images.

    Attributes:
      config: sizes.
      dtype, param_dtype: of computation and of stored parameters. Norms and softmax are float32 always.
      remat: what of a block is kept for the backward pass, see `models.remat`.
      attention_implementation: see `models.attention`.
      scan_unroll: blocks in a turn of the compiled loop, see `models.remat.stacked`.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"
    attention_implementation: str = "auto"
    scan_unroll: int = 0

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        context: jax.Array,
        pooled: jax.Array,
        references: jax.Array | None = None,
        reference_sizes: jax.Array | None = None,
    ) -> jax.Array:
        """One evaluation of the network.

        Args:
          latents: [B, H, W, C], normalised VAE latents with noise.
          timestep: [B], 1000 * sigma.
          context: [B, S, joint_attention_dim], the conditioner's token states.
          pooled: [B, pooled_projection_dim].
          references: clean latents [B, R, Hr, Wr, C], each in the top-left corner of its padding, or None.
          reference_sizes: int [B, R, 2], valid (height, width) of each reference in latent pixels, multiples of
            patch_size; (0, 0) means absent. None: every reference fills its array, and no mask is needed (faster).

        Returns:
          Velocity [B, H, W, out_channels] in the dtype of `latents`.

        Raises:
          ValueError: when shapes do not fit the config or each other.
        """
        config = self.config
        check_inputs(config, latents, timestep, context, pooled, references, reference_sizes)
        compute = Compute(self.dtype, self.param_dtype, self.attention_implementation)
        embed = PatchEmbed(config, compute, name="pos_embed")
        x = embed(latents)
        emb = TimeTextEmbed(config, compute, name="time_text_embed")(timestep, pooled)
        text = dense(config.width, compute, name="context_embedder")(context)

        skip, mask = 0, None
        if references is not None and references.shape[1]:
            tokens, valid = self._embed_references(embed, references, reference_sizes)
            skip = tokens.shape[1]
            if valid is not None:
                rest = jnp.ones((x.shape[0], x.shape[1] + text.shape[1]), bool)
                mask = jnp.concatenate([valid, rest], axis=1)[:, None, None]
            x = jnp.concatenate([tokens, x], axis=1)
        if padding := filler(x.shape[1] + text.shape[1], jnp.dtype(self.dtype), self.attention_implementation):
            text = jnp.pad(text, ((0, 0), (0, padding), (0, 0)))
            if mask is not None:
                mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, padding)))

        streams = (x, text)
        heads, qk_norm = config.num_attention_heads, config.qk_norm is not None
        for name, layers in config.groups.items():
            dual = layers.start < len(config.dual_attention_layers)
            if name == "last_block":
                streams, _ = Block(heads, qk_norm, compute, dual, last=True, skip=skip, padding=padding, name=name)(
                    streams, emb, mask
                )
                continue
            blocks = stacked(Block, self.remat, len(layers), unroll=self.scan_unroll, in_axes=nn.broadcast)
            streams, _ = blocks(heads, qk_norm, compute, dual, padding=padding, name=name)(streams, emb, mask)

        scale, shift = Modulation(2, compute, name="norm_out")(emb)
        channels = config.patch_size**2 * config.velocity_channels
        x = modulate(layer_norm(streams[0]), scale, shift)
        x = dense(channels, compute, kernel_init=nn.initializers.zeros, name="proj_out")(x)
        patch, rows = config.patch_size, latents.shape[1] // config.patch_size
        velocity = rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=patch, q=patch)
        return velocity.astype(latents.dtype)

    def _embed_references(
        self, embed: PatchEmbed, references: jax.Array, sizes: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """-> tokens [B, R * S, D] and which of them are real, bool [B, R * S] (None: all)."""
        batch, _, height, width, _ = references.shape
        flat = rearrange(references, "b r h w c -> (b r) h w c")
        if sizes is None:
            return rearrange(embed(flat), "(b r) s d -> b (r s) d", b=batch), None
        patch = self.config.patch_size
        grids = rearrange(jnp.asarray(sizes), "b r two -> (b r) two") // patch

        def inside(height: int, width: int, ends: jax.Array) -> jax.Array:
            rows, columns = jnp.arange(height) < ends[:, :1], jnp.arange(width) < ends[:, 1:]
            return rows[:, :, None] & columns[:, None, :]

        # Masking the tokens is not enough: a NaN in the padding would still reach the gradient of the embedding.
        flat = jnp.where(inside(height, width, grids * patch)[..., None], flat, 0)
        valid = rearrange(inside(height // patch, width // patch, grids), "(b r) h w -> b (r h w)", b=batch)
        return rearrange(embed(flat, grids), "(b r) s d -> b (r s) d", b=batch), valid


def check_inputs(
    config: MMDiTConfig,
    latents: jax.Array,
    timestep: jax.Array,
    context: jax.Array,
    pooled: jax.Array,
    references: jax.Array | None = None,
    reference_sizes: jax.Array | None = None,
) -> None:
    """Raises a ValueError of one sentence when the shapes given to `MMDiT` cannot work."""

    def check_image(name: str, shape: tuple[int, ...]) -> None:
        *_, height, width, channels = shape
        if channels != config.in_channels:
            raise ValueError(f"{name} have {channels} channels but the network takes {config.in_channels}.")
        if min(height, width) < 1 or height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"{name} of {height}x{width} cannot be cut into {config.patch_size}x{config.patch_size} patches; "
                f"make both edges multiples of {config.patch_size}."
            )
        limit = config.pos_embed_max_size * config.patch_size
        if max(height, width) > limit:
            raise ValueError(
                f"{name} of {height}x{width} exceed the position table of {limit}x{limit}; use smaller ones."
            )

    if latents.ndim != 4:
        raise ValueError(f"Latents must be [B, H, W, C] but have shape {latents.shape}.")
    check_image("Latents", latents.shape)
    batch = latents.shape[0]
    if timestep.shape != (batch,):
        raise ValueError(f"Timestep must be [{batch}], one per sample, but has shape {timestep.shape}.")
    if context.ndim != 3 or context.shape[0] != batch or context.shape[-1] != config.joint_attention_dim:
        raise ValueError(f"Context must be [{batch}, S, {config.joint_attention_dim}] but has shape {context.shape}.")
    if pooled.shape != (batch, config.pooled_projection_dim):
        raise ValueError(f"Pooled text must be [{batch}, {config.pooled_projection_dim}] but has shape {pooled.shape}.")
    if references is None:
        if reference_sizes is not None:
            raise ValueError("reference_sizes came without references; pass both or neither.")
        return
    if references.ndim != 5 or references.shape[0] != batch:
        raise ValueError(f"References must be [{batch}, R, H, W, C] but have shape {references.shape}.")
    check_image("References", references.shape)
    if reference_sizes is not None and reference_sizes.shape != (batch, references.shape[1], 2):
        raise ValueError(
            f"reference_sizes must be [{batch}, {references.shape[1]}, 2] but have shape {reference_sizes.shape}."
        )
