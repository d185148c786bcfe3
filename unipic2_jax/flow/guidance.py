"""Classifier-free guidance: `v = v_u + scale (v_c - v_u)`, so scale 1 is the conditional velocity alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

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


def guided_spans(sigmas: Any, interval: tuple[float, float] | None = None) -> list[tuple[int, int, bool]]:
    """A sampler's steps, cut where guidance begins and ends (arXiv 2404.07724): (first, behind the last, whether they are guided).

    Args:
      sigmas: [T + 1], falling.
      interval: (low, high); a step is guided where the noise level at which it begins lies in it, its ends included. None: all are.
    """
    total = len(sigmas) - 1
    if interval is None:
        return [(0, total, True)]
    low, high = interval
    guided = [bool(low <= sigma <= high) for sigma in sigmas[:-1]]
    cuts = [0, *(i for i in range(1, total) if guided[i] != guided[i - 1]), total]
    return [(first, last, guided[first]) for first, last in itertools.pairwise(cuts)]


def check_interval(interval: Any, scale: float) -> None:
    """Raises ValueError, one sentence, for an interval of guidance that is none, or that changes nothing."""
    if interval is None:
        return
    ends = tuple(interval) if isinstance(interval, Iterable) and not isinstance(interval, str) else ()
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not numbers or not 0 <= ends[0] <= ends[1] <= 1:
        raise ValueError(f"guidance_interval is {interval!r}; give two noise levels, 0 <= low <= high <= 1.")
    if scale <= 1:
        raise ValueError(
            f"guidance_interval changes nothing at guidance_scale {scale:g}, which is no guidance; raise it, or leave "
            "guidance_interval out."
        )


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
