"""The flow-matching loss of a batch of latents (paper section 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipic2_jax.flow.guidance import VelocityFn
from unipic2_jax.flow.path import interpolate
from unipic2_jax.flow.timesteps import TimestepSampling, sample_sigmas, velocity_loss


def draw_corruption(
    key: jax.Array, shape: tuple[int, ...], sampling: TimestepSampling, caption_dropout: float = 0.0
) -> dict[str, jax.Array]:
    """What is random about the loss of latents of this shape [B, h, w, C]: 'noise' like them, 'sigma' [B], and 'drop' [B],
    which captions are left out.
    """
    noise_key, sigma_key, drop_key = jax.random.split(key, 3)
    return {
        "noise": jax.random.normal(noise_key, shape, jnp.float32),
        "sigma": sample_sigmas(sigma_key, shape[0], sampling),
        "drop": jax.random.bernoulli(drop_key, caption_dropout, shape[:1]),
    }


def flow_losses(
    velocity_fn: VelocityFn, latents: jax.Array, corruption: dict[str, jax.Array], weighting: str = "none"
) -> jax.Array:
    """Squared velocity errors of a batch, float32 [B].

    Args:
      velocity_fn: (noisy latents [B, h, w, C], sigma [B]) -> velocity like the latents.
      latents: [B, h, w, C], normalised.
      corruption: of `draw_corruption`.
      weighting: see `flow.timesteps.velocity_loss`.
    """
    noise, sigma = corruption["noise"], corruption["sigma"]
    velocity = velocity_fn(interpolate(latents, noise, sigma), sigma)
    return velocity_loss(velocity, latents, noise, sigma, weighting)


def loss_by_noise(losses: jax.Array, sigma: jax.Array) -> dict[str, jax.Array]:
    """The mean loss, and its means at high (sigma > 0.8) and at low noise."""
    high = sigma > 0.8
    return {
        "loss": losses.mean(),
        "loss_high_noise": jnp.sum(losses * high) / jnp.maximum(high.sum(), 1),
        "loss_low_noise": jnp.sum(losses * ~high) / jnp.maximum((~high).sum(), 1),
    }


def flow_step_flops(forward: int, batch: int, trains_weights: bool) -> int:
    """One step of flow matching: the forward pass, gradients of activations, and of weights where they are trained.

    Args:
      forward: of one sample, from `forward_flops`.
      batch: samples.
      trains_weights: whether the transformer's own weights are trained; if not, gradients only go through it.
    """
    return forward * batch * (3 if trains_weights else 2)
