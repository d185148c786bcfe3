"""AutoencoderKL: the convolutional VAE of Stable Diffusion 3.5, images <-> latents at 1/8 of their size.

Follows diffusers' `AutoencoderKL` (same parameters, same numbers); the arrays are NHWC here, NCHW there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from unipic2_jax.models.attention import attention
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.remat import rematerialised

GROUP_NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
DOWN_BLOCK_TYPE, UP_BLOCK_TYPE = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclasses.dataclass(frozen=True)
class VAEConfig(ModelConfig):
    """Sizes of the autoencoder; the defaults are `stabilityai/stable-diffusion-3.5-medium`, folder `vae/`.

    `force_upcast` is kept only for the round trip of config.json: the module's `dtype` decides the arithmetic here.
    """

    CLASS_NAME = "AutoencoderKL"

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 1.5305
    shift_factor: float | None = 0.0609
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True
    force_upcast: bool = True

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"VAE block_out_channels has {channels}, not a multiple of norm_num_groups={self.norm_num_groups}; "
                    "change one of them."
                )

    @property
    def downsampling(self) -> int:
        """How many image pixels one latent pixel spans along each edge (8 for SD3.5)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def adapted(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """As they are; raises ValueError for an AutoencoderKL with parts that this network does not have."""
        blocks = len(values.get("block_out_channels", cls.block_out_channels))
        supported = {
            "act_fn": "silu",
            "latents_mean": None,
            "latents_std": None,
            "down_block_types": [DOWN_BLOCK_TYPE] * blocks,
            "up_block_types": [UP_BLOCK_TYPE] * blocks,
        }
        for name, wanted in supported.items():
            stated = values.get(name, wanted)
            if (list(stated) if isinstance(stated, tuple) else stated) != wanted:
                raise ValueError(f"The AutoencoderKL config has {name}={stated!r}; only {wanted!r} is supported.")
        return values

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the block types without which diffusers builds another network."""
        blocks = len(self.block_out_channels)
        types = {"down_block_types": [DOWN_BLOCK_TYPE] * blocks, "up_block_types": [UP_BLOCK_TYPE] * blocks}
        return super().to_dict() | types | {"act_fn": "silu"}


class GroupNorm(nn.Module):
    """Group normalisation in float32: [B, H, W, C] -> the same in `dtype`, optionally followed by SiLU."""

    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, silu: bool = False) -> jax.Array:
        channels = x_BxHxWxC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype).astype(jnp.float32)

        # Over the pixels first and then over a group's channels: both sums run along contiguous channels, several
        # times faster on CPU than one reduction over pixels and a narrow group axis.
        def group_mean(values: jax.Array) -> jax.Array:
            per_channel = values.mean(axis=(1, 2))
            per_group = rearrange(per_channel, "b (g c) -> b g c", g=self.groups).mean(axis=-1)
            return repeat(per_group, "b g -> b 1 1 (g c)", c=channels // self.groups)

        x = x_BxHxWxC.astype(jnp.float32)
        centred = x - group_mean(x)
        x = centred * (jax.lax.rsqrt(group_mean(jnp.square(centred)) + GROUP_NORM_EPS) * scale) + bias
        return (nn.silu(x) if silu else x).astype(self.dtype)


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut: [B, H, W, C_in] -> [B, H, W, channels]."""

    channels: int
    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.groups, **kinds, name="norm1")(x_BxHxWxC, silu=True)
        h = nn.Conv(self.channels, (3, 3), padding=1, **kinds, name="conv1")(h)
        h = GroupNorm(self.groups, **kinds, name="norm2")(h, silu=True)
        h = nn.Conv(self.channels, (3, 3), padding=1, **kinds, name="conv2")(h)
        if x_BxHxWxC.shape[-1] != self.channels:
            x_BxHxWxC = nn.Conv(self.channels, (1, 1), **kinds, name="conv_shortcut")(x_BxHxWxC)
        return x_BxHxWxC + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels with a shortcut: [B, H, W, C] -> [B, H, W, C]."""

    groups: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        _, height, _, channels = x_BxHxWxC.shape
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.groups, **kinds, name="group_norm")(x_BxHxWxC)
        h = rearrange(h, "b h w c -> b (h w) 1 c")
        query, key, value = (nn.Dense(channels, **kinds, name=name)(h) for name in ("to_q", "to_k", "to_v"))
        h = attention(query, key, value, network="VAE")
        h = rearrange(h, "b (h w) 1 c -> b h w c", h=height)
        return x_BxHxWxC + nn.Dense(channels, **kinds, name="to_out")(h)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution: [B, h, w, C] -> [B, h, w, C]."""

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = self.config.norm_num_groups
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        resnet = rematerialised(ResnetBlock, self.remat, scanned=False)
        x = resnet(x.shape[-1], groups, **kinds, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(groups, **kinds, name="attentions_0")(x)
        return resnet(x.shape[-1], groups, **kinds, name="resnets_1")(x)


class DownBlock(nn.Module):
    """Resnets at one resolution, then half of it unless last: [B, H, W, C_in] -> [B, H / 2, W / 2, channels]."""

    config: VAEConfig
    channels: int
    last: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        resnet = rematerialised(ResnetBlock, self.remat, scanned=False)
        for j in range(self.config.layers_per_block):
            x = resnet(self.channels, self.config.norm_num_groups, **kinds, name=f"resnets_{j}")(x)
        if self.last:
            return x
        # The original pads only below and to the right.
        return nn.Conv(self.channels, (3, 3), 2, padding=((0, 1), (0, 1)), **kinds, name="downsampler")(x)


class UpBlock(nn.Module):
    """Resnets at one resolution, then twice it unless last: [B, h, w, C_in] -> [B, 2 h, 2 w, channels]."""

    config: VAEConfig
    channels: int
    last: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        resnet = rematerialised(ResnetBlock, self.remat, scanned=False)
        for j in range(self.config.layers_per_block + 1):
            x = resnet(self.channels, self.config.norm_num_groups, **kinds, name=f"resnets_{j}")(x)
        if self.last:
            return x
        x = repeat(x, "b h w c -> b (h 2) (w 2) c")
        return nn.Conv(self.channels, (3, 3), padding=1, **kinds, name="upsampler")(x)


class Encoder(nn.Module):
    """Images [B, H, W, 3] -> moments [B, h, w, 2 * latent_channels] (means, then log-variances)."""

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        config = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths = config.block_out_channels
        x = nn.Conv(widths[0], (3, 3), padding=1, **kinds, name="conv_in")(images_BxHxWxC.astype(self.dtype))
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = DownBlock(config, width, last, **kinds, remat=self.remat, name=f"down_blocks_{i}")(x)
        x = MidBlock(config, **kinds, remat=self.remat, name="mid_block")(x)
        x = GroupNorm(config.norm_num_groups, **kinds, name="conv_norm_out")(x, silu=True)
        return nn.Conv(2 * config.latent_channels, (3, 3), padding=1, **kinds, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents [B, h, w, latent_channels] -> images [B, H, W, 3]."""

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, latents_BxHxWxC: jax.Array) -> jax.Array:
        config = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths = config.block_out_channels[::-1]
        x = nn.Conv(widths[0], (3, 3), padding=1, **kinds, name="conv_in")(latents_BxHxWxC.astype(self.dtype))
        x = MidBlock(config, **kinds, remat=self.remat, name="mid_block")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = UpBlock(config, width, last, **kinds, remat=self.remat, name=f"up_blocks_{i}")(x)
        x = GroupNorm(config.norm_num_groups, **kinds, name="conv_norm_out")(x, silu=True)
        return nn.Conv(config.out_channels, (3, 3), padding=1, **kinds, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder. `module.apply({'params': p}, images, method='encode')`, likewise `'decode'`.

    Attributes:
      config: the sizes.
      dtype: of convolutions and attention; normalisation, softmax and results are float32.
      param_dtype: of the parameters.
      remat: what of a resnet block is kept for the backward pass, see `models.remat`.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(config, **kinds, remat=self.remat)
        self.decoder = Decoder(config, **kinds, remat=self.remat)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), **kinds)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), **kinds)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images to the posterior over latents.

        Args:
          images: [B, H, W, in_channels] in [-1, 1]; H and W are multiples of `config.downsampling`.

        Returns:
          mean and log-variance, each float32 [B, h, w, latent_channels], the latter clipped to [-30, 20].

        Raises:
          ValueError: the images' shape does not fit.
        """
        return split_moments(self.moments(images))

    def moments(self, images: jax.Array) -> jax.Array:
        """What `split_moments` takes apart, [B, h, w, 2 * latent_channels]; arguments and errors as `encode`."""
        factor = self.config.downsampling
        *_, height, width, channels = images.shape
        if (
            images.ndim != 4
            or channels != self.config.in_channels
            or height % factor
            or width % factor
            or 0 in (height, width)
        ):
            raise ValueError(
                f"The VAE cannot encode images of shape {images.shape}; give it [batch, height, width, "
                f"{self.config.in_channels}] with both edges multiples of {factor}."
            )
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return moments

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, latent_channels] (not normalised) to float32 images [B, H, W, out_channels], unclipped."""
        if latents.ndim != 4 or latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"The VAE cannot decode latents of shape {latents.shape}; give it [batch, height, width, "
                f"{self.config.latent_channels}]."
            )
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents.astype(self.dtype))
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reconstruction through a sample (through the mean without a key), mean and log-variance: for training."""
        mean, logvar = self.encode(images)
        latents = mean if key is None else sample_latents(mean, logvar, key)
        return self.decode(latents), mean, logvar


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., 2 * C] -> mean and clipped log-variance, float32 [..., C]."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def sample_latents(mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
    """One draw from the posterior N(mean, exp(logvar)); shapes as `mean`."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per latent element, in nats, as `mean`."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def normalize(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """VAE latents to the diffusion model's: (z - shift) * scale."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def denormalize(latents: jax.Array, config: VAEConfig) -> jax.Array:
    """The diffusion model's latents to the VAE's: z / scale + shift."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)


def map_chunked(function: Callable[[jax.Array], Any], array: jax.Array, chunk: int) -> Any:
    """`function(array)` with at most `chunk` rows of the leading axis in flight, in one compiled loop.

    Args:
      function: array [b, ...] -> pytree of arrays [b, ...], row by row independent.
      array: [B, ...]; B need not be a multiple of `chunk`: the last chunk is filled with zeros that are thrown away.
      chunk: the most rows at a time.

    Raises:
      ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"The chunk size is {chunk}; it must be at least 1.")
    batch = array.shape[0]
    if batch <= chunk:
        return function(array)
    loops = -(-batch // chunk)
    rows = -(-batch // loops)
    padded = jnp.pad(array, [(0, loops * rows - batch)] + [(0, 0)] * (array.ndim - 1))
    # Every chunk takes each `loops`-th row, so a batch sharded over devices stays spread over them within a chunk.
    results = jax.lax.map(function, rearrange(padded, "(rows loops) ... -> loops rows ...", loops=loops))
    return jax.tree.map(lambda leaf: rearrange(leaf, "loops rows ... -> (rows loops) ...")[:batch], results)


def encode_chunked(module: AutoencoderKL, params: Any, images: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """`AutoencoderKL.encode` with at most `chunk` images in memory at a time: images [B, H, W, 3] -> mean, logvar."""
    return map_chunked(lambda x: module.apply({"params": params}, x, method="encode"), images, chunk)


def decode_chunked(module: AutoencoderKL, params: Any, latents: jax.Array, chunk: int) -> jax.Array:
    """`AutoencoderKL.decode` with at most `chunk` images in memory at a time: latents [B, h, w, C] -> images."""
    return map_chunked(lambda z: module.apply({"params": params}, z, method="decode"), latents, chunk)
