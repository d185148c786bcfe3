"""Stochastic sampling with known transition probabilities, which is what makes the sampler a policy.

`flow_grpo` is the SDE of Flow-GRPO (arXiv 2505.05470, equation 9) as its code discretises it; in the limit of many
steps it keeps the marginals of the flow. `cps` is coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): it
mixes predicted image, predicted noise and fresh noise so that every step ends with exactly the noise its level says.
It keeps that sum and the mean, not the marginal: what it trusts is a prediction, so some variance of the images is
lost at any number of steps. All in float32.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from unipic2_jax.flow.path import expand, predict_noise, predict_x0


@dataclasses.dataclass(frozen=True)
class FlowGRPO:
    """Noise `s sqrt(sigma - sigma_next)` with `s = noise_level sqrt(sigma / (1 - sigma))`, pulled back by the score's drift."""

    noise_level: float

    def diffusion(self, sigma: jax.Array, sigma_next: jax.Array, sigma_1: jax.Array) -> jax.Array:
        """`s`; a sigma of 1 inside the root's denominator is replaced by `sigma_1`, the schedule's second value."""
        sigma = jnp.asarray(sigma, jnp.float32)
        return self.noise_level * jnp.sqrt(sigma / (1.0 - jnp.where(sigma == 1.0, sigma_1, sigma)))

    def std(self, s: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        return s * jnp.sqrt(jnp.asarray(sigma - sigma_next, jnp.float32))

    def mean(
        self, velocity: jax.Array, x: jax.Array, s: jax.Array, sigma: jax.Array, sigma_next: jax.Array
    ) -> jax.Array:
        dt = sigma_next - sigma
        pull = s**2 / (2.0 * sigma)
        return x * (1.0 + pull * dt) + velocity * (1.0 + pull * (1.0 - sigma)) * dt

    def log_density(self, squared: jax.Array, std: jax.Array) -> jax.Array:
        return -squared / (2.0 * std**2) - jnp.log(std) - 0.5 * math.log(2.0 * math.pi)


@dataclasses.dataclass(frozen=True)
class CPS:
    """Noise `s = sigma_next sin(noise_level pi / 2)` in place of as much of the predicted noise.

    The normalisation of the log-density is dropped (Flow-CPS): `-(x_next - mean)^2`, finite also where the std is 0.
    """

    noise_level: float

    def diffusion(self, sigma: jax.Array, sigma_next: jax.Array, sigma_1: jax.Array) -> jax.Array:
        del sigma, sigma_1
        return jnp.asarray(sigma_next, jnp.float32) * math.sin(self.noise_level * math.pi / 2)

    def std(self, s: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
        del sigma, sigma_next
        return s

    def mean(
        self, velocity: jax.Array, x: jax.Array, s: jax.Array, sigma: jax.Array, sigma_next: jax.Array
    ) -> jax.Array:
        del s  # sqrt(sigma_next^2 - s^2), without the cancellation:
        kept = sigma_next * math.cos(self.noise_level * math.pi / 2)
        return (1.0 - sigma_next) * predict_x0(x, velocity, sigma) + kept * predict_noise(x, velocity, sigma)

    def log_density(self, squared: jax.Array, std: jax.Array) -> jax.Array:
        del std
        return -squared


KINDS: dict[str, type[FlowGRPO] | type[CPS]] = {"flow_grpo": FlowGRPO, "cps": CPS}


@dataclasses.dataclass(frozen=True)
class SDEConfig:
    """Which noise a stochastic step adds, and how much.

    Raises:
      ValueError: when the kind is unknown or the level is out of range. A level of 0 is refused because such a
        step has no probability to differentiate; use `ode.sample_ode`.
    """

    kind: str = "flow_grpo"
    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"SDE kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
        if not (math.isfinite(self.noise_level) and self.noise_level > 0):
            raise ValueError(f"The SDE's noise_level is {self.noise_level}; it must be above 0 (use the ODE for 0).")
        if self.kind == "cps" and self.noise_level > 1:
            raise ValueError(f"The noise_level of a cps step is {self.noise_level}; it must be at most 1.")

    @property
    def noise(self) -> FlowGRPO | CPS:
        """The formulas of this kind."""
        return KINDS[self.kind](self.noise_level)


def diffusion(sigma: jax.Array, sigma_next: jax.Array, sigma_1: jax.Array, config: SDEConfig) -> jax.Array:
    """The coefficient `s` of the step from `sigma` to `sigma_next`, float32, shaped like them."""
    return config.noise.diffusion(sigma, sigma_next, sigma_1)


def step_std(sigma: jax.Array, sigma_next: jax.Array, sigma_1: jax.Array, config: SDEConfig) -> jax.Array:
    """Standard deviation of the noise that the step adds."""
    return config.noise.std(diffusion(sigma, sigma_next, sigma_1, config), sigma, sigma_next)


def sde_step_mean_std(
    velocity: jax.Array,
    x: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    sigma_1: jax.Array,
    config: SDEConfig,
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the next latents.

    Args:
      velocity: [B, ...] at (`x`, `sigma`).
      x: [B, ...], the latents at `sigma`.
      sigma, sigma_next: noise levels, scalar or [B], `sigma_next < sigma`.
      sigma_1: the schedule's second noise level, scalar.
      config: the kind of noise.

    Returns:
      mean float32 [B, ...]; std float32 that broadcasts against it (scalar, or [B, 1, ...]).
    """
    std = expand(step_std(sigma, sigma_next, sigma_1, config), x)
    s = expand(diffusion(sigma, sigma_next, sigma_1, config), x)
    sigma, sigma_next = expand(sigma, x), expand(sigma_next, x)
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    return config.noise.mean(velocity, x, s, sigma, sigma_next), std


def log_prob(x_next: jax.Array, mean: jax.Array, std: jax.Array, config: SDEConfig) -> jax.Array:
    """Log-probability of `x_next` [B, ...], as the *mean* over a sample's elements: float32 [B].

    The sum would be the true log-density, but its ratios overflow at latent sizes; the references use the mean.
    """
    value = config.noise.log_density(jnp.square(x_next.astype(jnp.float32) - mean), std)
    return jnp.mean(value, axis=tuple(range(1, value.ndim)))


def sde_step(
    key: jax.Array,
    velocity: jax.Array,
    x: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    sigma_1: jax.Array,
    config: SDEConfig,
    noise: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One stochastic step, arguments as in `sde_step_mean_std`: (x_next, mean, std, log_prob [B]).

    `noise`, standard normal like `x`, is used instead of what the key gives.
    """
    mean, std = sde_step_mean_std(velocity, x, sigma, sigma_next, sigma_1, config)
    x_next = mean + std * (jax.random.normal(key, mean.shape, jnp.float32) if noise is None else noise)
    return x_next, mean, std, log_prob(x_next, mean, std, config)
