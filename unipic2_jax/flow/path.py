"""The straight path between an image and noise (rectified flow), and the velocity along it. float32 inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expand(sigma: jax.Array | float, like: jax.Array) -> jax.Array:
    """A scalar or [B] noise level as float32, shaped to broadcast against `like` [B, ...]."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim)) if sigma.ndim else sigma


def interpolate(x0: jax.Array, noise: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """The point at noise level `sigma` (scalar or [B]): `(1 - sigma) x0 + sigma noise`, float32 [B, ...]."""
    sigma = expand(sigma, x0)
    return (1.0 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def target_velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """What the network learns, d x_sigma / d sigma: `noise - x0`, float32 [B, ...]."""
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def predict_x0(x: jax.Array, velocity: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """The clean image that a velocity at `x` implies: `x - sigma v`, float32 [B, ...]."""
    return x.astype(jnp.float32) - expand(sigma, x) * velocity.astype(jnp.float32)


def predict_noise(x: jax.Array, velocity: jax.Array, sigma: jax.Array | float) -> jax.Array:
    """The noise that a velocity at `x` implies: `x + (1 - sigma) v`, float32 [B, ...]."""
    return x.astype(jnp.float32) + (1.0 - expand(sigma, x)) * velocity.astype(jnp.float32)
