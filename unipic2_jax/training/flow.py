"""The flow-matching loss of a batch of latents, tokens and references (paper section 3.1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.flow.path import interpolate
from unipic2_jax.flow.timesteps import TimestepSampling, sample_sigmas, velocity_loss
from unipic2_jax.models.mmdit import MMDiT


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
    transformer: MMDiT,
    conditioner: Any,
    params: dict[str, Any],
    batch: dict[str, Any],
    corruption: dict[str, jax.Array],
    *,
    weighting: str = "none",
    num_train_timesteps: int = 1000,
) -> jax.Array:
    """Squared velocity errors of a batch, float32 [B].

    Args:
      params: {'transformer': ..., 'conditioner': ...} and, of a network with a LoRA, 'lora'.
      batch: 'latents' [B, h, w, C] normalised; 'references' [B, R, h, w, C] for edits; and what conditions: 'tokens' and
        'empty_tokens', what the conditioner's `tokenize` gave for the captions and for empty ones (one for all, or one
        each), or 'conditioning' and 'empty_conditioning', what `apply` made of them.
      corruption: of `draw_corruption`.
    """
    latents, noise, sigma, drop = batch["latents"], corruption["noise"], corruption["sigma"], corruption["drop"]
    kept = lambda given, empty: jnp.where(drop.reshape(-1, *[1] * (given.ndim - 1)), empty, given)
    if "conditioning" in batch:
        context, pooled = jax.tree.map(kept, batch["conditioning"], batch["empty_conditioning"])
    else:
        tokens = jax.tree.map(kept, batch["tokens"], batch["empty_tokens"])
        context, pooled = conditioner.apply(params["conditioner"], tokens)
    variables = {"params": params["transformer"]}
    if "lora" in params:
        variables["lora"] = params["lora"]
    velocity = transformer.apply(
        variables,
        interpolate(latents, noise, sigma),
        sigma * num_train_timesteps,
        context,
        pooled,
        batch.get("references"),
    )
    return velocity_loss(velocity, latents, noise, sigma, weighting)


def loss_by_noise(losses: jax.Array, sigma: jax.Array) -> dict[str, jax.Array]:
    """The mean loss, and its means at high (sigma > 0.8) and at low noise."""
    high = sigma > 0.8
    return {
        "loss": losses.mean(),
        "loss_high_noise": jnp.sum(losses * high) / jnp.maximum(high.sum(), 1),
        "loss_low_noise": jnp.sum(losses * ~high) / jnp.maximum((~high).sum(), 1),
    }
