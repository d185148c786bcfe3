"""The flow-matching loss of a batch of latents, tokens and references (paper section 3.1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.flow.path import interpolate
from unipic2_jax.flow.timesteps import TimestepSampling, sample_sigmas, velocity_loss
from unipic2_jax.models.mmdit import MMDiT


def flow_loss(
    transformer: MMDiT,
    conditioner: Any,
    params: dict[str, Any],
    batch: dict[str, Any],
    key: jax.Array,
    *,
    sampling: TimestepSampling,
    weighting: str = "none",
    caption_dropout: float = 0.0,
    num_train_timesteps: int = 1000,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared velocity error at random noise levels.

    Args:
      params: {'transformer': ..., 'conditioner': ...}.
      batch: 'latents' [B, h, w, C] normalised; 'tokens' and 'empty_tokens', what the conditioner's `tokenize` gave for the
        captions and for empty ones (one for all, or one each); 'references' [B, R, h, w, C] for edits.
      key: draws noise, noise levels and which captions are dropped.

    Returns:
      The scalar loss, and the loss at high (sigma > 0.8) and at low noise apart.
    """
    latents = batch["latents"]
    noise_key, sigma_key, drop_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    sigma = sample_sigmas(sigma_key, latents.shape[0], sampling)
    drop = jax.random.bernoulli(drop_key, caption_dropout, (latents.shape[0],))
    tokens = jax.tree.map(
        lambda given, empty: jnp.where(drop.reshape(-1, *[1] * (given.ndim - 1)), empty, given),
        batch["tokens"],
        batch["empty_tokens"],
    )
    context, pooled = conditioner.apply(params["conditioner"], tokens)
    velocity = transformer.apply(
        {"params": params["transformer"]},
        interpolate(latents, noise, sigma),
        sigma * num_train_timesteps,
        context,
        pooled,
        batch.get("references"),
    )
    losses = velocity_loss(velocity, latents, noise, sigma, weighting)
    high = sigma > 0.8
    parts = {
        "loss_high_noise": jnp.sum(losses * high) / jnp.maximum(high.sum(), 1),
        "loss_low_noise": jnp.sum(losses * ~high) / jnp.maximum((~high).sum(), 1),
    }
    return losses.mean(), parts
