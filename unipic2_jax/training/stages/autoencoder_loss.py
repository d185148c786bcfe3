"""The loss that trains an autoencoder from nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.models.sd3.vae import AutoencoderKL, kl_divergence, sample_latents


def autoencoder_loss(
    module: AutoencoderKL, params: Any, images: jax.Array, key: jax.Array, kl_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L1 + mean squared error of the reconstruction from a posterior sample, plus `kl_weight` x KL per latent element.

    Args:
      images: [B, H, W, 3] in [-1, 1].
      key: draws the posterior sample.

    Returns:
      The scalar loss, and 'reconstruction' and 'kl' (nats per latent element) apart.
    """
    mean, logvar = module.apply({"params": params}, images, method="encode")
    decoded = module.apply({"params": params}, sample_latents(mean, logvar, key), method="decode")
    error = decoded - images
    reconstruction = jnp.mean(jnp.abs(error)) + jnp.mean(error**2)
    kl = jnp.mean(kl_divergence(mean, logvar))
    loss = reconstruction + kl_weight * kl
    return loss, {"reconstruction": reconstruction, "kl": kl}
