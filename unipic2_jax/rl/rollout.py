"""Sampling trajectories from the policy, with the probability of every stochastic step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unipic2_jax.flow.guidance import VelocityFn
from unipic2_jax.flow.ode import euler_step
from unipic2_jax.flow.sde import sde_step
from unipic2_jax.parallel.rules import constrain
from unipic2_jax.rl.config import GRPOConfig

# Inside of a fusion XLA may keep what the program rounds to bfloat16 in float32, and sampler and trainer fuse differently: their
# log-probabilities then differ by more than the clip range.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def jit_exactly(function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """`jax.jit` of a program that computes log-probabilities: rounded where it says so and nowhere else."""
    given = jit_options.pop("compiler_options", None) or {}
    return jax.jit(function, compiler_options={**COMPILER_OPTIONS, **given}, **jit_options)


class Trajectory(NamedTuple):
    """What a rollout leaves for training."""

    latents: jax.Array  # [T + 1, B, ...] float32, from noise to image
    log_probs: jax.Array  # [T, B] float32; 0 at deterministic steps
    means: jax.Array | None  # [T, B, ...] means of the steps; see `GRPOConfig.keeps_means`
    sigmas: jax.Array  # [T + 1] float32
    steps: jax.Array  # [K] int32, the steps that are trained

    @staticmethod
    def batch_axes() -> dict[str, int | None]:
        return {"latents": 1, "log_probs": 1, "means": 1, "sigmas": None, "steps": None}

    @property
    def finished(self) -> jax.Array:
        """The samples, [B, ...]."""
        return self.latents[-1]


def draw_window(key: jax.Array, config: GRPOConfig) -> jax.Array:
    """The first step of a rollout's window, int32 scalar, uniform over the places where it fits; 0 without one."""
    if config.window is None:
        return jnp.zeros((), jnp.int32)
    size, (low, high) = config.window
    return jax.random.randint(key, (), low, high - size + 1, jnp.int32)


def draw_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32."""
    return jax.random.normal(key, shape, jnp.float32)


def rows_of(draw: Callable[[int], jax.Array], count: int, number: jax.Array, parts: int) -> jax.Array:
    """The rows [count, ...] of part `number` of what `draw` gives for the samples of all parts together: what is drawn for a sample
    does not depend on how many are sampled at once."""
    return jax.lax.dynamic_slice_in_dim(draw(count * parts), number * count, count)


def _deterministic(
    velocity_fn: VelocityFn, x: jax.Array, key: jax.Array, sigma: jax.Array, sigma_next: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A step outside of the window: where it leads, its log-probability, which is 0, and its mean."""
    del key
    x_next = euler_step(velocity_fn(x, sigma), x, sigma, sigma_next)
    return x_next, jnp.zeros(x.shape[:1], jnp.float32), x_next


def rollout(
    velocity_fn: VelocityFn,
    initial_noise: jax.Array,
    key: jax.Array,
    sigmas: jax.Array,
    config: GRPOConfig,
    window_start: jax.Array | int = 0,
    outside_fn: VelocityFn | None = None,
    shared_fns: tuple[VelocityFn, VelocityFn] | None = None,
    rows: tuple[jax.Array, int] | None = None,
) -> Trajectory:
    """Samples a batch, one step after the other in a scan.

    Args:
      velocity_fn: the policy, (latents float32 [B, ...], sigma scalar) -> velocity.
      initial_noise: [B, ...].
      key: random key of the steps' noise.
      sigmas: [T + 1] noise levels, as from `flow.schedule.sigmas`.
      config: with a window, steps outside it are deterministic.
      window_start: from `draw_window`; may be traced. Not used without a window.
      outside_fn: velocity of the steps outside the window; `velocity_fn` by default.
      shared_fns: cheaper equals of (velocity_fn, outside_fn) for the window's first step and the steps before it, where
        the samples of a group are still the same (`once_per_group`); None: there are none.
      rows: (number, parts): the batch is this one of so many equal parts of a larger one, whose noise it has.

    Returns:
      A `Trajectory`; the samples are `latents[-1]`.

    Raises:
      ValueError: when `sigmas` does not have `num_steps + 1` values.
    """
    total = config.num_steps
    sigmas = jnp.asarray(sigmas, jnp.float32)
    if sigmas.shape != (total + 1,):
        raise ValueError(f"The rollout has {total} steps but sigmas of shape {sigmas.shape}; give {total + 1} values.")
    start = jnp.asarray(window_start if config.window is not None else 0, jnp.int32)
    outside_fn = velocity_fn if outside_fn is None else outside_fn

    def stochastic(
        velocity_fn: VelocityFn, x: jax.Array, key: jax.Array, sigma: jax.Array, sigma_next: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        noise = None if rows is None else rows_of(lambda count: draw_noise(key, (count, *x.shape[1:])), len(x), *rows)
        velocity = velocity_fn(x, sigma)
        x_next, mean, _, log_prob = sde_step(key, velocity, x, sigma, sigma_next, sigmas[1], config.sde, noise)
        return x_next, log_prob, mean

    end = start + config.trained_steps
    inside, outside = functools.partial(stochastic, velocity_fn), functools.partial(_deterministic, outside_fn)
    # Where a step stands to the window, and what it does there; the first that is so counts.
    cases = [(lambda index: (index >= start) & (index < end), inside)]
    if shared_fns is not None:
        first_fn, before_fn = shared_fns
        cases = [
            (lambda index: index < start, functools.partial(_deterministic, before_fn)),
            (lambda index: index == start, functools.partial(stochastic, first_fn)),
            # A window of one step has nothing behind its first: one network less to compile.
            *(cases if config.trained_steps > 1 else []),
        ]
    cases.append((lambda index: index >= 0, outside))

    def step(x: jax.Array, scanned: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        index, *rest = scanned
        if config.window is None:
            x_next, log_prob, mean = inside(x, *rest)
        else:
            case = jnp.argmax(jnp.stack([holds(index) for holds, _ in cases]))
            x_next, log_prob, mean = jax.lax.switch(case, [do for _, do in cases], x, *rest)
        x_next = constrain(x_next, "batch", *[None] * (x.ndim - 1))
        return x_next, (x_next, log_prob, mean if config.keeps_means else None)

    x = initial_noise.astype(jnp.float32)
    scanned = (jnp.arange(total), jax.random.split(key, total), sigmas[:-1], sigmas[1:])
    _, (latents, log_probs, means) = jax.lax.scan(step, x, scanned)
    steps = start + jnp.arange(config.trained_steps, dtype=jnp.int32)
    return Trajectory(jnp.concatenate([x[None], latents]), log_probs, means, sigmas, steps)
