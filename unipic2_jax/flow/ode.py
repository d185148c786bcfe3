"""Deterministic sampling along the velocity: by Euler, equal to diffusers' FlowMatchEuler, or by a solver of second order.

In `lambda = log((1 - sigma) / sigma)`, with `h` the length of a step in it and `x0` the predicted image, the step of `dpm2`, the
two-step DPM-Solver++ (arXiv 2211.01095, algorithm 2 "2M"; what DiffusionNFT samples with) on the straight path, is

    x' = k x + (1 - k) (x0 + (h / h_before) (x0 - x0_before) / 2)        k = sigma' / sigma

which is Euler's step and a part of the last change of `x0`: a second evaluation of the network is not needed. The first and the
last step are Euler's, as in DiffusionNFT's solver; so is one after a step from sigma 1, where `h_before` is infinite.

`unipc` (arXiv 2302.04867, of second order with B_2(h) = exp(h) - 1) takes the same step. Before it, at every level but the first, it
goes back to where the last step began and takes that step once more, now knowing the image that the network predicts at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipic2_jax.flow.guidance import VelocityFn
from unipic2_jax.flow.path import expand, predict_x0

SOLVERS = ("euler", "dpm2", "unipc")

# What a solver carries from step to step, float32 [B, ...] each: the latents, and what `_STEPS` says of the solver.
State = tuple[jax.Array, ...]


class Steps(NamedTuple):
    """The numbers of a sampler's steps, float32 [T] each; those that come after the last step are never read.

    Attributes:
      sigma, sigma_next: where a step begins and ends.
      correction: what it multiplies the last change of the predicted image by.
      again: [T, 4], of `unipc`: the weights, in the step before taken once more, of where it began, of the predicted image there, of
        that one step earlier, and of the one at its end. Nothing where there is no step before.
    """

    sigma: Any
    sigma_next: Any
    correction: Any = None
    again: Any = None


def euler_step(velocity: jax.Array, x: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
    """`x + (sigma_next - sigma) v`, float32 [B, ...]; the noise levels are scalars or [B]."""
    x = x.astype(jnp.float32)
    return x + expand(sigma_next - sigma, x) * velocity.astype(jnp.float32)


def correction_weights(sigmas: Any) -> Any:
    """What a step multiplies the last change of the predicted image by: [T], 0 where the step is Euler's.

    NumPy in float64 for an array of NumPy, else JAX in float32.
    """
    xp, sigmas = _library(sigmas)
    steps = _log_ratio_steps(xp, sigmas)
    with np.errstate(invalid="ignore"):  # of the last one alone, which is Euler's
        inner = 0.5 * (1.0 - sigmas[2:] / sigmas[1:-1]) * steps[1:] / steps[:-1]
    weights = xp.concatenate([xp.zeros(1), inner])
    return xp.concatenate([weights[:-1], xp.zeros(1)])


def again_weights(sigmas: Any) -> Any:
    """See `Steps.again`, [T, 4]; precision as `correction_weights`."""
    xp, sigmas = _library(sigmas)
    # Steps that end at a level where the network is asked: all but the last one.
    steps, kept = _log_ratio_steps(xp, sigmas)[:-1], sigmas[1:-1] / sigmas[:-2]
    # The first of them has one predicted image to begin with and is of first order, the others are of second.
    ratio = -steps[:-1] / steps[1:]
    shrunk = xp.expm1(-steps[1:])
    first = (shrunk / -steps[1:] - 1.0) / shrunk
    second = 2.0 * (shrunk * first / -steps[1:] - 0.5) / shrunk
    earlier = (first - second) / (1.0 - ratio)
    half, nothing = xp.full(min(1, len(kept)), 0.5), xp.zeros(min(1, len(kept)))
    at_end = xp.concatenate([half, first - earlier])
    earlier = xp.concatenate([nothing, earlier / ratio])
    moved = 1.0 - kept
    rows = xp.stack([kept, moved * (1.0 - at_end - earlier), moved * earlier, moved * at_end], axis=1)
    return xp.concatenate([xp.zeros((1, 4)), rows])


def _library(sigmas: Any) -> tuple[Any, Any]:
    if isinstance(sigmas, jax.Array):
        return jnp, sigmas.astype(jnp.float32)
    return np, np.asarray(sigmas, np.float64)


def _log_ratio_steps(xp: Any, sigmas: Any) -> Any:
    """The lengths of steps in log((1 - sigma) / sigma), infinite where one begins at 1 or ends at 0."""
    with np.errstate(divide="ignore"):
        return xp.diff(xp.log1p(-sigmas) - xp.log(sigmas))


def make_steps(sigmas: Any, solver: str = "euler", length: int | None = None) -> Steps:
    """The steps along `sigmas` [T + 1].

    Args:
      length: of the tables, at least T, so that samplers of different lengths are one program.

    Raises:
      ValueError: for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"The solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}.")
    steps = Steps(sigmas[:-1], sigmas[1:])
    if solver != "euler":
        steps = steps._replace(correction=correction_weights(sigmas))
    if solver == "unipc":
        steps = steps._replace(again=again_weights(sigmas))
    as_floats = (lambda x: x.astype(jnp.float32)) if isinstance(sigmas, jax.Array) else lambda x: np.asarray(x, "f4")
    steps = jax.tree.map(as_floats, steps)
    if length is None:
        return steps
    return jax.tree.map(lambda x: np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)]), steps)


def start(noise: jax.Array, solver: str = "euler") -> State:
    """The state before the first step, from latents [B, ...] at the first noise level."""
    noise = noise.astype(jnp.float32)
    return (noise, *[jnp.zeros_like(noise)] * {"euler": 0, "dpm2": 1, "unipc": 3}[solver])


def _euler(velocity_fn: VelocityFn, state: State, at: Steps) -> State:
    (x,) = state
    return (euler_step(velocity_fn(x, at.sigma), x, at.sigma, at.sigma_next),)


def _dpm2(velocity_fn: VelocityFn, state: State, at: Steps) -> State:
    x, x0_before = state
    velocity = velocity_fn(x, at.sigma)
    x0 = predict_x0(x, velocity, at.sigma)
    return euler_step(velocity, x, at.sigma, at.sigma_next) + at.correction * (x0 - x0_before), x0


def _unipc(velocity_fn: VelocityFn, state: State, at: Steps) -> State:
    x, began, x0_before, x0_earlier = state
    x0 = predict_x0(x, velocity_fn(x, at.sigma), at.sigma)
    weights = at.again
    again = weights[0] * began + weights[1] * x0_before + weights[2] * x0_earlier + weights[3] * x0
    # There is no step before the first; all its weights are 0.
    x = jnp.where(weights[0] > 0, again, x)
    kept = at.sigma_next / at.sigma
    return kept * x + (1.0 - kept) * x0 + at.correction * (x0 - x0_before), x, x0, x0_before


_STEPS: dict[str, Callable[[VelocityFn, State, Steps], State]] = {"euler": _euler, "dpm2": _dpm2, "unipc": _unipc}


def advance(
    velocity_fn: VelocityFn,
    state: State,
    steps: Steps,
    first: int | jax.Array,
    last: int | jax.Array,
    solver: str = "euler",
) -> State:
    """The state after the steps `first` to `last - 1`, in one compiled loop.

    Args:
      velocity_fn: (latents float32 [B, ...], sigma scalar) -> velocity [B, ...]; evaluated once a step.
      state: of `start`, or of the call before.
      steps: of `make_steps`.
      first, last: whole numbers; traced ones make one program of all of them, which then cannot be differentiated.
    """
    steps = jax.tree.map(jnp.asarray, steps)
    step = _STEPS[solver]
    return jax.lax.fori_loop(
        first, last, lambda i, state: step(velocity_fn, state, jax.tree.map(lambda x: x[i], steps)), state
    )


def sample_ode(velocity_fn: VelocityFn, initial_noise: jax.Array, sigmas: Any, solver: str = "euler") -> jax.Array:
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
    steps = make_steps(sigmas, solver)
    return advance(velocity_fn, start(jnp.asarray(initial_noise), solver), steps, 0, len(steps.sigma), solver)[0]
