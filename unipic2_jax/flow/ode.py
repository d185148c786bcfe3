"""Deterministic sampling: along the velocity by Euler, equal to diffusers' FlowMatchEuler, or with a correction of second order.

`dpm2` is the two-step DPM-Solver++ (arXiv 2211.01095, algorithm 2 "2M"; what DiffusionNFT samples with) on the straight path. In
`lambda = log((1 - sigma) / sigma)`, with `h` the length of a step in it and `x0` the predicted image, its step is

    x' = k x + (1 - k) (x0 + (h / h_before) (x0 - x0_before) / 2)        k = sigma' / sigma

which is Euler's step and a part of the last change of `x0`: a second evaluation of the network is not needed. The first and the
last step are Euler's, as in DiffusionNFT's solver; so is one after a step from sigma 1, where `h_before` is infinite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipic2_jax.flow.guidance import VelocityFn
from unipic2_jax.flow.path import expand, predict_x0

SOLVERS = ("euler", "dpm2")


def euler_step(velocity: jax.Array, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
    """`x + (sigma_next - sigma) v`, float32 [B, ...]; the noise levels are scalars or [B]."""
    x = x.astype(jnp.float32)
    return x + expand(sigma_next - sigma, x) * velocity.astype(jnp.float32)


def correction_weights(sigmas: jax.Array) -> jax.Array:
    """What `dpm2` multiplies the last change of the predicted image by, at each step: float32 [T], 0 where the step is Euler's."""
    sigmas = jnp.asarray(sigmas, jnp.float32)
    steps = jnp.diff(jnp.log1p(-sigmas) - jnp.log(sigmas))
    inner = 0.5 * (1.0 - sigmas[2:] / sigmas[1:-1]) * steps[1:] / steps[:-1]
    weights = jnp.concatenate([jnp.zeros(1), inner])
    return weights.at[-1].set(0.0)


def sample_ode(
    velocity_fn: VelocityFn, initial_noise: jax.Array, sigmas: jax.Array, solver: str = "euler"
) -> jax.Array:
    """Integrates from noise to latents with one evaluation per pair of neighbours in `sigmas`.

    Args:
      velocity_fn: (latents float32 [B, ...], sigma scalar) -> velocity [B, ...].
      initial_noise: [B, ...], the latents at `sigmas[0]`.
      sigmas: float32 [T + 1], as from `schedule.sigmas`.
      solver: one of `SOLVERS`.

    Returns:
      Latents float32 [B, ...] at `sigmas[-1]`.

    Raises:
      ValueError: for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"The solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}.")
    sigmas, start = jnp.asarray(sigmas, jnp.float32), initial_noise.astype(jnp.float32)

    def euler(x: jax.Array, levels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, sigma_next = levels
        return euler_step(velocity_fn(x, sigma), x, sigma, sigma_next), None

    def corrected(
        carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        (x, x0_before), (sigma, sigma_next, weight) = carry, scanned
        velocity = velocity_fn(x, sigma)
        x0 = predict_x0(x, velocity, sigma)
        return (euler_step(velocity, x, sigma, sigma_next) + weight * (x0 - x0_before), x0), None

    if solver == "euler":
        return jax.lax.scan(euler, start, (sigmas[:-1], sigmas[1:]))[0]
    scanned = (sigmas[:-1], sigmas[1:], correction_weights(sigmas))
    return jax.lax.scan(corrected, (start, jnp.zeros_like(start)), scanned)[0][0]
