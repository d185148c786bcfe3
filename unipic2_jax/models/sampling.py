"""The pure functions behind the pipelines; training, reinforcement and evaluation use the same ones.

Everything here is (modules, parameters, arrays) -> arrays and may be jitted, differentiated and sharded. Parameter and
LoRA trees are arguments, so the same compiled program serves the live, the reference and the averaged policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unipic2_jax.flow.guidance import VelocityFn, guided_spans, guided_velocity_batched
from unipic2_jax.flow.ode import State, Steps, advance, make_steps, start
from unipic2_jax.flow.seeds import folded
from unipic2_jax.models.registry import backbone_of
from unipic2_jax.models.sd3.vae import AutoencoderKL, decode_chunked, denormalize, encode_chunked, normalize
from unipic2_jax.models.sd3.vae_tiles import decode_tiled, encode_tiled
from unipic2_jax.parallel.compat import current_mesh
from unipic2_jax.parallel.rules import RULES, devices_along
from unipic2_jax.pictures.resize import to_uint8

if TYPE_CHECKING:
    from unipic2_jax.models.bundle import Bundle

# Pixels of images that the VAE works on at a time, on each device: 16 images of 512 x 512, 4 of 1024 x 1024.
VAE_PIXELS = 2**22
# Pictures with a longer edge go through it in tiles of this one, which is diffusers' for this VAE.
TILE_PIXELS = 1024

# What conditions the transformer: context [B, S, J] and pooled [B, P].
Conditioning = tuple[jax.Array, jax.Array]


def vae_chunk(height: int, width: int) -> int:
    """How many images of this size (pixels) the VAE handles at once, on all devices that a batch is split over together."""
    mesh = current_mesh()
    devices = 1 if mesh.empty else devices_along(mesh, RULES.batch)
    return devices * max(1, VAE_PIXELS // (height * width))


def velocity_fn(
    transformer: nn.Module,
    params: Any,
    conditioning: Conditioning,
    references: jax.Array | None = None,
    reference_sizes: jax.Array | None = None,
    *,
    lora: Any = None,
    num_train_timesteps: int = 1000,
) -> VelocityFn:
    """The network as a flow sees it: (latents [B, h, w, C], sigma scalar or [B]) -> velocity, float32 [B, h, w, C].

    Args:
      transformer, params, lora: the network; `lora` is a tree of `models.lora` or None.
      conditioning: (context [B, S, J], pooled [B, P]).
      references, reference_sizes: see `MMDiT.__call__`.
    """
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    context, pooled = conditioning
    call = backbone_of(transformer.config).velocity

    def velocity(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        timestep = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32) * num_train_timesteps, latents.shape[:1])
        out = call(transformer, variables, latents, timestep, context, pooled, references, reference_sizes)
        return out.astype(jnp.float32)

    return velocity


def guided_velocity_fn(
    transformer: nn.Module,
    params: Any,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    guidance_scale: float | jax.Array,
    references: jax.Array | None = None,
    reference_sizes: jax.Array | None = None,
    *,
    lora: Any = None,
    stop_gradient_uncond: bool = False,
    num_train_timesteps: int = 1000,
) -> VelocityFn:
    """`velocity_fn` under classifier-free guidance: one evaluation on [unconditional, conditional] stacked.

    References go to both branches, as in the published pipeline. Without `unconditional` there is no guidance and
    `guidance_scale` is not used.
    """
    options = {"lora": lora, "num_train_timesteps": num_train_timesteps}
    if unconditional is None:
        return velocity_fn(transformer, params, conditioning, references, reference_sizes, **options)
    both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), tuple(unconditional), tuple(conditioning))
    references, reference_sizes = jax.tree.map(lambda x: jnp.concatenate([x, x]), (references, reference_sizes))
    batched = velocity_fn(transformer, params, both, references, reference_sizes, **options)
    return guided_velocity_batched(batched, guidance_scale, stop_gradient_uncond)


def image_keys(seeds: Any) -> jax.Array:
    """One PRNG key per seed, any whole numbers [B]. The generator is fixed, so a seed means the same on every backend."""
    if not isinstance(seeds, jax.Array):
        seeds = np.asarray([folded(seed) for seed in seeds], np.uint32)
    return jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(jnp.asarray(seeds, jnp.uint32))


def initial_noise(keys: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Standard normal float32 [B, *shape]; image i depends on key i alone, whatever the batch."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape, jnp.float32))(keys)


def encode_moments(vae: AutoencoderKL, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images [N, H, W, 3] in [-1, 1] -> the VAE's (mean, logvar), each [N, h, w, C], in chunks of bounded memory."""
    if max(images.shape[1:3]) > TILE_PIXELS:
        return encode_tiled(vae, params, images, TILE_PIXELS, vae_chunk(TILE_PIXELS, TILE_PIXELS))
    return encode_chunked(vae, params, images, vae_chunk(*images.shape[1:3]))


def reference_latents(
    vae: AutoencoderKL, mean: jax.Array, logvar: jax.Array, keys: jax.Array | None, index: jax.Array | int = 0
) -> jax.Array:
    """Normalised latents [N, h, w, C] from the VAE's moments: a sample per key, or the mode when `keys` is None.

    `index` (scalar or [N]) tells a prompt's references apart, so that each gets noise of its own from the one key.
    """
    if keys is not None:
        index = jnp.broadcast_to(index, mean.shape[:1])
        draw = lambda key, i: jax.random.normal(jax.random.fold_in(key, 1 + i), mean.shape[1:], jnp.float32)
        mean = mean + jnp.exp(0.5 * logvar) * jax.vmap(draw)(keys, index)
    return normalize(mean, vae.config)


def encode_images(vae: AutoencoderKL, params: Any, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Images [N, H, W, 3] in [-1, 1] -> normalised latents [N, h, w, C]: VAE samples, or modes when `keys` is None."""
    return reference_latents(vae, *encode_moments(vae, params, images), keys)


def decode_latents(vae: AutoencoderKL, params: Any, latents: jax.Array) -> jax.Array:
    """Normalised latents [N, h, w, C] -> images float32 [N, H, W, 3], about [-1, 1] (not clipped)."""
    height, width = (edge * vae.config.downsampling for edge in latents.shape[1:3])
    latents = denormalize(latents, vae.config)
    if max(height, width) > TILE_PIXELS:
        return decode_tiled(vae, params, latents, TILE_PIXELS, vae_chunk(TILE_PIXELS, TILE_PIXELS))
    return decode_chunked(vae, params, latents, vae_chunk(height, width))


def decode_pictures(vae: AutoencoderKL, params: Any, latents: jax.Array) -> jax.Array:
    """`decode_latents` as uint8 [N, H, W, 3]: what leaves the device has a quarter of the bytes, and the host rounds nothing."""
    return to_uint8(decode_latents(vae, params, latents))


def denoise_steps(
    transformer: nn.Module,
    params: Any,
    state: State,
    steps: Steps,
    first: int | jax.Array,
    last: int | jax.Array,
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    guidance_scale: float | jax.Array = 1.0,
    references: jax.Array | None = None,
    reference_sizes: jax.Array | None = None,
    lora: Any = None,
    *,
    solver: str = "euler",
    num_train_timesteps: int = 1000,
) -> State:
    """The sampler's state after the steps `first` to `last - 1` of `steps`; see `flow.ode.advance`.

    With traced `first` and `last` it is one program for any number of steps that `steps` has room for.
    """
    velocity = guided_velocity_fn(
        transformer,
        params,
        conditioning,
        unconditional,
        guidance_scale,
        references,
        reference_sizes,
        lora=lora,
        num_train_timesteps=num_train_timesteps,
    )
    return advance(velocity, state, steps, first, last, solver)


def denoise(
    transformer: nn.Module,
    params: Any,
    noise: jax.Array,
    sigmas: Any,
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    *options: Any,
    solver: str = "euler",
    guidance_interval: tuple[float, float] | None = None,
    **named: Any,
) -> jax.Array:
    """From `noise` [B, h, w, C] along `sigmas` [T + 1] to latents float32 [B, h, w, C].

    Args:
      options, named: what follows `unconditional` in `denoise_steps`.
      guidance_interval: see `flow.guidance.guided_spans`; outside of it the unconditional branch is not evaluated. With one,
        `sigmas` cannot be traced.
    """
    state, steps = start(noise, solver), make_steps(sigmas, solver)
    for first, last, guided in guided_spans(sigmas, guidance_interval):
        branches = (conditioning, unconditional if guided else None)
        state = denoise_steps(
            transformer, params, state, steps, first, last, *branches, *options, solver=solver, **named
        )
    return state[0]


def sample_images(
    bundle: Bundle,
    params: Any,
    tokens: dict[str, jax.Array],
    noise: jax.Array,
    sigmas: jax.Array,
    *,
    negative_tokens: dict[str, jax.Array] | None = None,
    guidance_scale: float | jax.Array = 1.0,
    reference_images: jax.Array | None = None,
    reference_keys: jax.Array | None = None,
    lora: Any = None,
    solver: str = "euler",
    guidance_interval: tuple[float, float] | None = None,
) -> jax.Array:
    """Everything from token ids to pictures in one program, for evaluation inside a training loop.

    Args:
      bundle: the modules (`models.bundle.Bundle`); its own parameters are not read.
      params: tree {'transformer', 'vae', 'conditioner'}.
      tokens: of `conditioner.tokenize`, [B, S] each.
      noise: [B, h, w, C]; sigmas: [T + 1].
      negative_tokens: as `tokens`, or one row for all; None switches guidance off.
      reference_images: [B, R, H, W, 3] in [-1, 1], or None.
      reference_keys: one key per image [B] for a VAE sample; None takes the mode.
      solver, guidance_interval: see `denoise`.

    Returns:
      Images float32 [B, H, W, 3], about [-1, 1] (not clipped).
    """
    conditioning = bundle.conditioner.apply(params["conditioner"], tokens)
    unconditional = None
    if negative_tokens is not None:
        unconditional = bundle.conditioner.apply(params["conditioner"], negative_tokens)
        unconditional = jax.tree.map(lambda u, c: jnp.broadcast_to(u, c.shape), unconditional, conditioning)
    references = None
    if reference_images is not None and bundle.conditioner.latent_references:
        batch, count = reference_images.shape[:2]
        mean, logvar = encode_moments(
            bundle.vae, params["vae"], reference_images.reshape(-1, *reference_images.shape[2:])
        )
        keys = None if reference_keys is None else jnp.repeat(reference_keys, count)
        latents = reference_latents(bundle.vae, mean, logvar, keys, jnp.tile(jnp.arange(count), batch))
        references = latents.reshape(batch, count, *latents.shape[1:])
    latents = denoise(
        bundle.transformer,
        params["transformer"],
        noise,
        sigmas,
        conditioning,
        unconditional,
        guidance_scale,
        references,
        lora=lora,
        solver=solver,
        guidance_interval=guidance_interval,
        num_train_timesteps=bundle.scheduler.num_train_timesteps,
    )
    return decode_latents(bundle.vae, params["vae"], latents)


def from_uint8(images: jax.Array) -> jax.Array:
    """The inverse of `pictures.resize.to_uint8`, float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1
