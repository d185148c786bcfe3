"""The clipped policy objective with a KL penalty, for one timestep of a batch of samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipic2_jax.flow.path import expand
from unipic2_jax.flow.sde import diffusion, log_prob, sde_step_mean_std
from unipic2_jax.rl.config import GRPOConfig


def _mean_square(x: jax.Array) -> jax.Array:
    """Mean of squares over everything but the batch: [B]."""
    return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


def _change(new: jax.Array, old: jax.Array | None, on_policy: jax.Array | bool) -> jax.Array:
    """`new - old`; where `on_policy`, exactly 0 (or NaN) with the gradient of `new`.

    The two differences are made before one is chosen: a compiler may compute `new` twice, once for each operation that uses it,
    but no operation sees it in two roundings.
    """
    own = new - jax.lax.stop_gradient(new)
    if isinstance(on_policy, bool):
        return own if on_policy else new - old
    return jnp.where(on_policy, own, new - old)


def _reference_kl(
    velocity: jax.Array,
    reference_velocity: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    x: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    sigma_1: jax.Array,
    config: GRPOConfig,
) -> jax.Array:
    """How far a step is from the reference's, as `config.kl_on` says: [B], with gradient for `velocity` and `mean` alone."""
    reference_velocity = jax.lax.stop_gradient(reference_velocity)
    if config.kl_on == "velocity":
        return _mean_square(velocity.astype(jnp.float32) - reference_velocity.astype(jnp.float32))
    reference_mean, _ = sde_step_mean_std(reference_velocity, x, sigma, sigma_next, sigma_1, config.sde)
    s = std if config.kl_divide_by_dt else expand(diffusion(sigma, sigma_next, sigma_1, config.sde), x)
    return _mean_square((mean - reference_mean) / s) / 2.0


def grpo_loss(
    velocity: jax.Array,
    reference_velocity: jax.Array | None,
    x: jax.Array,
    x_next: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    sigma_1: jax.Array,
    old_log_prob: jax.Array | None,
    advantage: jax.Array,
    config: GRPOConfig,
    old_mean: jax.Array | None = None,
    on_policy: jax.Array | bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`max(-A r, -A clip(r, 1 - eps, 1 + eps)) + beta KL` per sample.

    The KL is `mean (mean - mean_ref)^2 / (2 s^2)`, as in Flow-GRPO's code, which leaves |dt| out of the step's
    variance; `kl_divide_by_dt` puts it back. With `kl_on='velocity'` it is `mean (v - v_ref)^2`. GRPO-Guard (arXiv
    2510.22319) removes the ratio's bias `mean (mean - mean_old)^2 / (2 std^2)`, scales its logarithm by the
    step's std and divides the policy loss by |dt|; its published code averages the bias over the whole batch,
    here every sample has its own.

    Flow-DPPO (arXiv 2606.11025, `trust='dppo'`) has no clip range: the policy loss `-A r` of a sample is left out where its step
    is `D = mean (mean - mean_old)^2 / (2 std^2) >= trust_tau` away from the old policy's and the ratio is already on the side that
    its advantage asks for (above 1 with A > 0, below 1 with A < 0).

    Args:
      velocity, reference_velocity: [B, ...] at (`x`, `sigma`). No gradient flows to the reference; None when
        `kl_beta` is 0.
      x, x_next: [B, ...], two neighbouring latents of the trajectory.
      sigma, sigma_next, sigma_1: scalars.
      old_log_prob, advantage: [B].
      config: the objective's constants.
      old_mean: [B, ...], the old policy's mean of this step; needed by `guard` and `trust='dppo'`.
      on_policy: scalar; where True the policy is its own old one: the ratio is 1 to the bit, and neither `old_log_prob` nor
        `old_mean` is looked at. Either may be None when it is a Python True.

    Returns:
      Loss [B] and metrics, each [B].

    Raises:
      ValueError: when the config needs an input that is None.
    """
    if config.kl_beta and reference_velocity is None:
        raise ValueError(f"kl_beta is {config.kl_beta} but there is no reference velocity; give one or set it to 0.")
    if config.compares_means and old_mean is None and on_policy is not True:
        needs = "guard" if config.guard else f"trust={config.trust!r}"
        raise ValueError(f"{needs} needs the old policy's means; roll out with the same config.")
    levels = (x, sigma, sigma_next, sigma_1)
    mean, std = sde_step_mean_std(velocity, *levels, config.sde)
    new_log_prob = log_prob(x_next, mean, std, config.sde)
    log_ratio = _change(new_log_prob, old_log_prob, on_policy)
    advantage = jnp.clip(advantage, -config.adv_clip_max, config.adv_clip_max)
    metrics = {"log_prob": new_log_prob, "approx_kl": 0.5 * jnp.square(log_ratio)}

    if config.compares_means:
        step_std = jnp.reshape(std, ())
        moved = _mean_square(_change(mean, old_mean, on_policy)) / (2.0 * step_std**2)
    if config.guard:
        log_ratio = (log_ratio + moved) * step_std
    ratio = jnp.exp(log_ratio)
    if config.trust == "dppo":
        held = jax.lax.stop_gradient((moved >= config.trust_tau) & ((ratio - 1.0) * advantage > 0))
        # Chosen and not multiplied: a ratio that overflows must not become NaN.
        policy_loss = jnp.where(held, 0.0, -advantage * ratio)
        metrics["moved"] = moved
    else:
        clipped = jnp.clip(ratio, 1.0 - config.clip_range, 1.0 + config.clip_range)
        policy_loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
        held = jnp.abs(ratio - 1.0) > config.clip_range
    if config.guard:
        policy_loss = policy_loss / (sigma - sigma_next)
    loss = policy_loss
    metrics |= {"policy_loss": policy_loss, "ratio": ratio, "clip_fraction": held.astype(jnp.float32)}

    if config.kl_beta:
        metrics["kl"] = _reference_kl(velocity, reference_velocity, mean, std, *levels, config)
        loss = loss + config.kl_beta * metrics["kl"]
    return loss, metrics | {"loss": loss}
