"""Which noise levels training sees, and how much each counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from unipic2_jax.flow.path import target_velocity
from unipic2_jax.flow.schedule import shift_sigma

KINDS = ("uniform", "logit_normal")
WEIGHTINGS = ("none", "sigma_squared", "sigma_sqrt", "cosmap")
# Keeps sampled levels inside (0, 1), where every weighting and the SDE's formulas are finite.
_EDGE = 1e-5


@dataclasses.dataclass(frozen=True)
class TimestepSampling:
    """How training draws noise levels.

    `logit_normal` is the sigmoid of a normal with `mean` and `std` (SD3 paper, section 3.1). `shift` is applied to
    what was drawn, whichever kind; 1 leaves it alone. With the shift of a model's scheduler this is what diffusers' SD3
    script draws, where u is a place in the scheduler's table, which is shifted already. The table counts down, so that the
    script's `logit_mean` is `-mean`.

    Raises:
      ValueError: when a field is out of range.
    """

    kind: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Timestep sampling {self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
        if not self.std > 0:
            raise ValueError(f"Timestep sampling has std {self.std}; it must be above 0.")
        if not self.shift > 0:
            raise ValueError(f"Timestep sampling has shift {self.shift}; it must be above 0 (1 means no shift).")


def sample_sigmas(key: jax.Array, batch: int, config: TimestepSampling) -> jax.Array:
    """Draws noise levels: float32 [batch], strictly between 0 and 1."""
    if config.kind == "uniform":
        sigma = jax.random.uniform(key, (batch,), jnp.float32)
    else:
        sigma = jax.nn.sigmoid(config.mean + config.std * jax.random.normal(key, (batch,), jnp.float32))
    return jnp.clip(shift_sigma(sigma, config.shift), _EDGE, 1.0 - _EDGE)


def loss_weight(sigma: jax.Array, weighting: str = "none") -> jax.Array:
    """Weight of the squared *velocity* error at noise levels `sigma`, same shape.

    `none` is 1. `sigma_squared` is what diffusers' SD3 training script does without saying so, by measuring the
    error of the implied clean image. `sigma_sqrt` (sigma^-2) and `cosmap` are diffusers'
    `compute_loss_weighting_for_sd3` under the same names; note that the script's `sigma_sqrt` on the clean-image
    error is `none` here.

    Raises:
      ValueError: when the weighting is unknown.
    """
    if weighting == "none":
        return jnp.ones_like(sigma)
    if weighting == "sigma_squared":
        return sigma**2
    if weighting == "sigma_sqrt":
        return sigma**-2.0
    if weighting == "cosmap":
        return 2.0 / (jnp.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2))
    raise ValueError(f"Loss weighting {weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}.")


def velocity_loss(
    velocity: jax.Array, x0: jax.Array, noise: jax.Array, sigma: jax.Array, weighting: str = "none"
) -> jax.Array:
    """Weighted mean squared error of a predicted velocity [B, ...] against `noise - x0`, per sample: float32 [B]."""
    error = jnp.square(velocity.astype(jnp.float32) - target_velocity(x0, noise))
    return loss_weight(sigma, weighting) * jnp.mean(error, axis=tuple(range(1, error.ndim)))
