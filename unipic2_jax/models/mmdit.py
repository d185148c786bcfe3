"""The MMDiT-X of Stable Diffusion 3.5 with Kontext references (UniPic 2.0 report, section 3.1).

Two token streams, image and text, attend to each other in every block. Reference latents enter the image stream
through the same patch embedding and the same cropped positions as the target: [reference tokens..., target tokens].
The parameters are those of diffusers' `SD3Transformer2DModel`, with the equal blocks stacked along a leading axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from unipic2_jax.models.attention import attention
from unipic2_jax.models.config import ModelConfig

EPS = 1e-6
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As the base; files older than SD3.5 lack the two newest fields and mean diffusers' defaults for them."""
        return super().from_dict({"dual_attention_layers": (), "qk_norm": None, **values})

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


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: shared by all submodules."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    lora_alpha: float = 64.0
    attention_implementation: str = "xla"


class Dense(nn.Module):
    """x [..., I] -> [..., features]; adds its own low-rank update when the collection 'lora' holds one for it."""

    features: int
    compute: Compute
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, param_dtype = self.compute.dtype, self.compute.param_dtype
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype)
        # As one matrix product XLA's CPU backend is up to twice as fast; accelerators do not care.
        lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1]).astype(dtype)
        y = x @ kernel.astype(dtype) + bias.astype(dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = y + (x @ a.astype(dtype)) @ b.astype(dtype) * (self.compute.lora_alpha / a.shape[-1])
        return y.reshape(*lead, self.features)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without learned scale or shift, in float32; keeps x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """x [B, S, D], scale and shift [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class RMSNorm(nn.Module):
    """Over the last axis, in float32, with a learned scale."""

    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.compute.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)
        return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


class Modulation(nn.Module):
    """AdaLN: silu(emb) [B, D] -> `count` vectors [B, D]. Zero-initialised, so that a new block is the identity."""

    count: int
    compute: Compute

    @nn.compact
    def __call__(self, emb: jax.Array) -> list[jax.Array]:
        linear = Dense(self.count * emb.shape[-1], self.compute, nn.initializers.zeros, name="linear")
        return jnp.split(linear(nn.silu(emb)), self.count, axis=-1)


class FeedForward(nn.Module):
    """[..., D] -> 4 D -> [..., D] with tanh-GELU."""

    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(Dense(4 * x.shape[-1], self.compute, name="linear_1")(x), approximate=True)
        return Dense(x.shape[-1], self.compute, name="linear_2")(hidden)


class Attention(nn.Module):
    """Self-attention of the image stream, joined with the text stream when `context` is given."""

    config: MMDiTConfig
    compute: Compute
    context_out: bool = True  # False: the text stream ends here, and only its keys and values matter.
    skip: int = 0  # This many leading image tokens need no output.

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, S, D], context [B, T, D], mask bool [B, 1, 1, S + T] or wider -> ([B, S - skip, D], [B, T, D])."""
        config = self.config

        def project(name: str, tokens: jax.Array, norm: str | None) -> jax.Array:
            y = Dense(config.width, self.compute, name=name)(tokens)
            y = rearrange(y, "b s (n d) -> b s n d", n=config.num_attention_heads)
            return RMSNorm(self.compute, name=norm)(y) if norm and config.qk_norm else y

        query = project("to_q", x[:, self.skip :], "norm_q")
        key, value = project("to_k", x, "norm_k"), project("to_v", x, None)
        length = query.shape[1]
        if context is not None:
            added = project("add_q_proj", context, "norm_added_q")
            if self.context_out:
                query = jnp.concatenate([query, added], axis=1)
            key = jnp.concatenate([key, project("add_k_proj", context, "norm_added_k")], axis=1)
            value = jnp.concatenate([value, project("add_v_proj", context, None)], axis=1)
        if mask is not None:
            mask = mask[..., : key.shape[1]]
        out = attention(query, key, value, mask=mask, implementation=self.compute.attention_implementation)
        out = rearrange(out, "b s n d -> b s (n d)")
        image = Dense(config.width, self.compute, name="to_out")(out[:, :length])
        if context is None or not self.context_out:
            return image, None
        return image, Dense(config.width, self.compute, name="to_add_out")(out[:, length:])


class Block(nn.Module):
    """A joint transformer block, diffusers' `JointTransformerBlock`.

    `dual` adds a second attention over image tokens alone. `last` ends the text stream and drops the `skip` leading
    image tokens: nothing behind the last block looks at references.
    """

    config: MMDiTConfig
    compute: Compute
    dual: bool = False
    last: bool = False
    skip: int = 0

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array], emb: jax.Array, mask: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """streams: image [B, S, D] and context [B, T, D]; emb [B, D]; mask bool [B, 1, 1, S + T] over keys, or None."""
        x, context = streams
        compute = self.compute
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = Modulation(
            9 if self.dual else 6, compute, name="norm1"
        )(emb)
        if self.last:
            # diffusers' AdaLayerNormContinuous: scale comes first here.
            context_scale, context_shift = Modulation(2, compute, name="norm1_context")(emb)
        else:
            context_shift, context_scale, context_gate, *context_mlp = Modulation(6, compute, name="norm1_context")(emb)

        normed = layer_norm(x)
        attended, context_attended = Attention(self.config, compute, not self.last, self.skip, name="attn")(
            modulate(normed, scale, shift), modulate(layer_norm(context), context_scale, context_shift), mask
        )
        x = x[:, self.skip :] + gate[:, None] * attended
        if self.dual:
            shift2, scale2, gate2 = second
            attended, _ = Attention(self.config, compute, skip=self.skip, name="attn2")(
                modulate(normed, scale2, shift2), None, mask
            )
            x = x + gate2[:, None] * attended
        forwarded = FeedForward(compute, name="ff")(modulate(layer_norm(x), scale_mlp, shift_mlp))
        x = x + gate_mlp[:, None] * forwarded
        if not self.last:
            shift_mlp, scale_mlp, gate_mlp = context_mlp
            context = context + context_gate[:, None] * context_attended
            forwarded = FeedForward(compute, name="ff_context")(modulate(layer_norm(context), scale_mlp, shift_mlp))
            context = context + gate_mlp[:, None] * forwarded
        return (x, context), None


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
        table = jax.lax.stop_gradient(self.table).reshape(grid, grid, -1).astype(jnp.float32)
        if grids is None:
            top, left = (grid - height) // 2, (grid - width) // 2
            positions = table[top : top + height, left : left + width]
        else:
            start = (grid - grids) // 2
            # Rows and columns beyond an image's own grid are padding: any entry will do.
            rows = jnp.clip(start[:, :1] + jnp.arange(height), 0, grid - 1)
            columns = jnp.clip(start[:, 1:] + jnp.arange(width), 0, grid - 1)
            positions = table[rows[:, :, None], columns[:, None, :]]
        return rearrange((tokens + positions).astype(tokens.dtype), "n h w d -> n (h w) d")


class TwoLayer(nn.Module):
    """Linear, SiLU, linear."""

    features: int
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.silu(Dense(self.features, self.compute, name="linear_1")(x))
        return Dense(self.features, self.compute, name="linear_2")(hidden)


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
      remat: recompute each block in the backward pass instead of storing its activations.
      lora_alpha: scale of the 'lora' collection's updates is lora_alpha / rank; without the collection there is none.
      attention_implementation: see `models.attention`.
      scan_unroll: blocks per iteration of the compiled loop.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = True
    lora_alpha: float = 64.0
    attention_implementation: str = "xla"
    scan_unroll: int = 1

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
        check_inputs(config, latents, context, pooled, references, reference_sizes)
        compute = Compute(self.dtype, self.param_dtype, self.lora_alpha, self.attention_implementation)
        embed = PatchEmbed(config, compute, name="pos_embed")
        x = embed(latents)
        emb = TimeTextEmbed(config, compute, name="time_text_embed")(timestep, pooled)
        text = Dense(config.width, compute, name="context_embedder")(context)

        skip, mask = 0, None
        if references is not None and references.shape[1]:
            tokens, valid = self._embed_references(embed, references, reference_sizes)
            skip = tokens.shape[1]
            if valid is not None:
                rest = jnp.ones((x.shape[0], x.shape[1] + text.shape[1]), bool)
                mask = jnp.concatenate([valid, rest], axis=1)[:, None, None]
            x = jnp.concatenate([tokens, x], axis=1)

        streams = (x, text)
        for name, layers in config.groups.items():
            dual = layers.start < len(config.dual_attention_layers)
            if name == "last_block":
                streams, _ = Block(config, compute, dual, last=True, skip=skip, name=name)(streams, emb, mask)
                continue
            # Inside a scan nothing can be merged with the forward pass, so the barrier against it is not needed.
            block = nn.remat(Block, prevent_cse=False) if self.remat else Block
            stacked = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=len(layers),
                unroll=min(self.scan_unroll, len(layers)),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            streams, _ = stacked(config, compute, dual, name=name)(streams, emb, mask)

        scale, shift = Modulation(2, compute, name="norm_out")(emb)
        channels = config.patch_size**2 * config.out_channels
        x = modulate(layer_norm(streams[0]), scale, shift)
        x = Dense(channels, compute, nn.initializers.zeros, name="proj_out")(x)
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
        rows = jnp.arange(height // patch) < grids[:, :1]
        columns = jnp.arange(width // patch) < grids[:, 1:]
        valid = rearrange(rows[:, :, None] & columns[:, None, :], "(b r) h w -> b (r h w)", b=batch)
        tokens = rearrange(embed(flat, grids), "(b r) s d -> b (r s) d", b=batch)
        # Zeroed as well as masked, so that not even a NaN in the padding can reach the result.
        return jnp.where(valid[..., None], tokens, 0), valid


def check_inputs(
    config: MMDiTConfig,
    latents: jax.Array,
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
        if (
            height < config.patch_size
            or width < config.patch_size
            or height % config.patch_size
            or width % config.patch_size
        ):
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
