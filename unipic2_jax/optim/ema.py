"""The moving average of the trained parameters, which evaluation uses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def ema_decay(step: jax.Array, decay: float = 0.9) -> jax.Array:
    """Decay after `step` optimizer steps: `min(decay, (1 + step) / (10 + step))`, as in Flow-GRPO's EMA."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def ema_update(ema: Any, params: Any, step: jax.Array, decay: float = 0.9, interval: int = 1) -> Any:
    """Moves the average towards `params` after optimizer step number `step` (the first is 0).

    It moves at the end of every `interval` steps. The average keeps its own dtype; float32 is advised, since with
    a decay near 1 the increments vanish in bfloat16.
    """
    rate = jnp.where((step + 1) % interval == 0, 1.0 - ema_decay(step, decay), 0.0)

    def move(average: jax.Array, value: jax.Array) -> jax.Array:
        high = average.astype(jnp.float32)
        return (high + rate * (value.astype(jnp.float32) - high)).astype(average.dtype)

    return jax.tree.map(move, ema, params)
