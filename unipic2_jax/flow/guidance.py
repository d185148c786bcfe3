"""Classifier-free guidance: `v = v_u + scale (v_c - v_u)`, so scale 1 is the conditional velocity alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (latents [B, ...], sigma scalar or [B]) -> velocity [B, ...]
VelocityFn = Callable[[jax.Array, jax.Array], jax.Array]


def combine(
    uncond: jax.Array, cond: jax.Array, scale: float | jax.Array, stop_gradient_uncond: bool = False
) -> jax.Array:
    """The guided velocity, float32, from the unconditional and the conditional one."""
    uncond, cond = uncond.astype(jnp.float32), cond.astype(jnp.float32)
    if stop_gradient_uncond:
        uncond = jax.lax.stop_gradient(uncond)
    return uncond + scale * (cond - uncond)


def needs_uncond(scale: float | jax.Array) -> bool:
    """Whether guidance evaluates the unconditional branch: always, but for a scale known to be exactly 1."""
    return not (isinstance(scale, (int, float)) and scale == 1)


def guided_velocity(
    cond_fn: VelocityFn,
    uncond_fn: VelocityFn | None,
    scale: float | jax.Array,
    stop_gradient_uncond: bool = False,
) -> VelocityFn:
    """A velocity function that evaluates the two branches one after the other (half the memory of `batched`).

    With `stop_gradient_uncond` the unconditional branch is not differentiated, so it costs no backward pass.

    Raises:
      ValueError: when the scale needs an unconditional branch and there is none.
    """
    if not needs_uncond(scale):
        return lambda latents, sigma: cond_fn(latents, sigma).astype(jnp.float32)
    if uncond_fn is None:
        raise ValueError(f"Guidance scale {scale} needs an unconditional branch; give one or use a scale of 1.")

    def velocity(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        return combine(uncond_fn(latents, sigma), cond_fn(latents, sigma), scale, stop_gradient_uncond)

    return velocity


def guided_velocity_batched(
    batched_fn: VelocityFn, scale: float | jax.Array, stop_gradient_uncond: bool = False
) -> VelocityFn:
    """A velocity function that evaluates both branches in one call on a batch of [uncond, cond] (diffusers' order).

    `batched_fn` takes latents [2B, ...] and sigma (scalar or [2B]); its conditioning inputs must be stacked alike.
    """

    def velocity(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        sigma = jnp.asarray(sigma)
        both = batched_fn(jnp.concatenate([latents, latents]), jnp.concatenate([sigma, sigma]) if sigma.ndim else sigma)
        uncond, cond = jnp.split(both, 2)
        return combine(uncond, cond, scale, stop_gradient_uncond)

    return velocity
