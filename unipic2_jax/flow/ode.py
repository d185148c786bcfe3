"""Deterministic sampling: Euler steps along the velocity, equal to diffusers' FlowMatchEuler."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipic2_jax.flow.guidance import VelocityFn
from unipic2_jax.flow.path import expand


def euler_step(velocity: jax.Array, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
    """`x + (sigma_next - sigma) v`, float32 [B, ...]; the noise levels are scalars or [B]."""
    x = x.astype(jnp.float32)
    return x + expand(sigma_next - sigma, x) * velocity.astype(jnp.float32)


def sample_ode(velocity_fn: VelocityFn, initial_noise: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Integrates from noise to latents with one Euler step per pair of neighbours in `sigmas`.

    Args:
      velocity_fn: (latents float32 [B, ...], sigma scalar) -> velocity [B, ...].
      initial_noise: [B, ...], the latents at `sigmas[0]`.
      sigmas: float32 [T + 1], as from `schedule.sigmas`.

    Returns:
      Latents float32 [B, ...] at `sigmas[-1]`.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def step(x: jax.Array, levels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, sigma_next = levels
        return euler_step(velocity_fn(x, sigma), x, sigma, sigma_next), None

    return jax.lax.scan(step, initial_noise.astype(jnp.float32), (sigmas[:-1], sigmas[1:]))[0]
