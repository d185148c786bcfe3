"""Policy updates: gradients over timesteps and micro-batches in one scan, optimizer steps, moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unipic2_jax.flow.sde import log_prob, sde_step_mean_std
from unipic2_jax.optim.ema import ema_update
from unipic2_jax.parallel.rules import constrain, constrain_parameters
from unipic2_jax.rl.config import GRPOConfig
from unipic2_jax.rl.objective import grpo_loss
from unipic2_jax.rl.rollout import PolicyFn, Trajectory, draw_window, jit_exactly, once_per_group, rollout

# (lora, batch) -> (scalar loss, metrics [B] each)
LossFn = Callable[[Any, dict[str, Any]], tuple[jax.Array, dict[str, jax.Array]]]


class PolicyState(NamedTuple):
    """What changes during a stage; a plain pytree, so it can be saved whole."""

    lora: Any
    opt_state: Any
    ema: Any  # like lora, float32
    step: jax.Array  # optimizer steps so far, int32


def init_state(lora: Any, optimizer: optax.GradientTransformation) -> PolicyState:
    """The state before the first update; the moving average starts at the parameters (in its own buffers)."""
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), lora)
    return PolicyState(jax.tree.map(jnp.copy, lora), optimizer.init(lora), ema, jnp.zeros((), jnp.int32))


def _part(x: jax.Array, index: jax.Array, parts: int, axis: int = 0) -> jax.Array:
    """Every `parts`-th entry along `axis`, beginning at `index`.

    Strided, because the batch is split over devices in contiguous blocks: each device then holds an equal share of
    every part, and no sample moves.
    """
    shape = x.shape[:axis] + (x.shape[axis] // parts, parts) + x.shape[axis + 1 :]
    return jax.lax.dynamic_index_in_dim(x.reshape(shape), index, axis + 1, keepdims=False)


def _parts(tree: Any, index: jax.Array, parts: int, axis: int = 0) -> Any:
    return tree if parts == 1 else jax.tree.map(lambda x: _part(x, index, parts, axis), tree)


class OldPolicy(NamedTuple):
    """What ratios are taken against, in micro-batches in the order in which `accumulate_gradients` visits them: V of b samples."""

    log_probs: jax.Array | None  # [V, b] float32
    means: jax.Array | None  # [V, b, ...] float32, for GRPO-Guard only
    on_policy: jax.Array | bool  # scalar: the policy is its own old one, and the rest is not looked at


def make_loss(policy_fn: PolicyFn, params: Any, reference_lora: Any, sigma_1: jax.Array, config: GRPOConfig) -> LossFn:
    """The loss of a micro-batch at one timestep, as `accumulate_gradients` wants it."""

    def loss_fn(lora, batch):
        x, sigma, inputs, old = batch["x"], batch["sigma"], batch["inputs"], batch["old"]
        reference = policy_fn(params, reference_lora, x, sigma, inputs) if config.kl_beta else None
        velocity = policy_fn(params, lora, x, sigma, inputs)
        loss, metrics = grpo_loss(
            velocity,
            reference,
            x,
            batch["x_next"],
            sigma,
            batch["sigma_next"],
            sigma_1,
            old.log_probs,
            batch["advantage"],
            config,
            old.means,
            old.on_policy,
        )
        metrics["log_prob_difference"] = jnp.abs(metrics.pop("log_prob") - batch["log_prob"])
        if batch["weight"] is not None:
            loss = metrics["loss"] = batch["weight"] * loss
        return jnp.mean(loss), metrics

    return loss_fn


def _micro_batches(
    trajectory: Trajectory, samples: Any, micro_batch: int | None
) -> tuple[int, Callable[[jax.Array], dict[str, Any]]]:
    """How many micro-batches the trained steps have, and the one of a number.

    Args:
      samples: pytree of what belongs to samples, leading axis B.

    Raises:
      ValueError: when `micro_batch` does not divide B.
    """
    batch = trajectory.latents.shape[1]
    size = batch if micro_batch is None else micro_batch
    if batch % size:
        raise ValueError(f"micro_batch {size} does not divide the {batch} samples of an update; choose a divisor.")
    parts = batch // size

    def data(index):
        step, part = trajectory.steps[index // parts], index % parts

        def at(values, offset=0):
            return _parts(jax.lax.dynamic_index_in_dim(values, step + offset, keepdims=False), part, parts)

        return {
            "x": at(trajectory.latents),
            "x_next": at(trajectory.latents, 1),
            "log_prob": at(trajectory.log_probs),
            "mean": None if trajectory.means is None else at(trajectory.means),
            "sigma": trajectory.sigmas[step],
            "sigma_next": trajectory.sigmas[step + 1],
            **_parts(samples, part, parts),
        }

    return parts * trajectory.steps.shape[0], data


def old_policy(
    policy_fn: PolicyFn, params: Any, lora: Any, trajectory: Trajectory, inputs: Any, config: GRPOConfig
) -> OldPolicy:
    """The policy's log-probabilities by the trainer: a forward pass in the update's micro-batches, without gradients."""
    count, data = _micro_batches(trajectory, {"inputs": inputs}, config.micro_batch)

    def visit(index):
        batch = data(index)
        x, sigma = batch["x"], batch["sigma"]
        velocity = policy_fn(params, lora, x, sigma, batch["inputs"])
        mean, std = sde_step_mean_std(velocity, x, sigma, batch["sigma_next"], trajectory.sigmas[1], config.sde)
        kept = constrain(mean, "batch", *[None] * (x.ndim - 1)) if config.guard else None
        return log_prob(batch["x_next"], mean, std, config.sde), kept

    return OldPolicy(*jax.lax.map(visit, jnp.arange(count)), on_policy=False)


def accumulate_gradients(
    loss_fn: LossFn,
    lora: Any,
    trajectory: Trajectory,
    advantages: jax.Array,
    inputs: Any,
    micro_batch: int | None = None,
    old: OldPolicy | None = None,
    weights: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of the mean loss over the trained timesteps and all samples, in the memory of one micro-batch.

    Args:
      loss_fn: from `make_loss`.
      lora: the parameters to differentiate.
      trajectory: latents [T + 1, B, ...] and the rest.
      advantages: [B].
      inputs: pytree with leading axis B.
      micro_batch: samples per pass; must divide B.
      old: the old policy; None: as the sampler recorded it in the trajectory.
      weights: [B] with mean 1, of samples in the loss; None: all count alike.

    Returns:
      Gradients (float32, shaped like `lora`) and metrics [K, B], of the samples in the order they were visited.

    Raises:
      ValueError: when `micro_batch` does not divide B.
    """
    samples = {"advantage": advantages, "inputs": inputs, "weight": weights}
    count, data = _micro_batches(trajectory, samples, micro_batch)

    def visit(gradients, scanned):
        index, log_probs, means = scanned
        batch = data(index)
        if old is None:
            batch["old"] = OldPolicy(batch["log_prob"], batch["mean"], False)
        else:
            batch["old"] = OldPolicy(log_probs, means, old.on_policy)
        (_, metrics), new = jax.value_and_grad(loss_fn, has_aux=True)(lora, batch)
        weight = 1.0 / count
        gradients = jax.tree.map(lambda g, n: g + weight * n.astype(jnp.float32), gradients, new)
        return constrain_parameters(gradients), metrics

    zeros = constrain_parameters(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), lora))
    scanned = (jnp.arange(count), None, None) if old is None else (jnp.arange(count), old.log_probs, old.means)
    gradients, metrics = jax.lax.scan(visit, zeros, scanned)
    return gradients, jax.tree.map(lambda m: m.reshape(trajectory.steps.shape[0], -1), metrics)


def _summarize(metrics: dict[str, jax.Array], gradient_norm: jax.Array) -> dict[str, jax.Array]:
    """Scalars of one update from per-sample metrics [K, B]."""
    ratio = metrics.pop("ratio")
    difference = metrics.pop("log_prob_difference")
    finite = jnp.isfinite(metrics["loss"]).all() & jnp.isfinite(gradient_norm)
    return {
        **{name: jnp.mean(values) for name, values in metrics.items()},
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "log_prob_difference": difference.mean(),
        "log_prob_difference_max": difference.max(),
        "gradient_norm": gradient_norm,
        "non_finite": 1.0 - finite.astype(jnp.float32),
    }


def _combine(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scalars of a rollout's updates, each metric [U]."""
    reduce = {"ratio_min": jnp.min, "ratio_max": jnp.max, "non_finite": jnp.max}
    # Only before the first optimizer step do sampler and trainer have the same policy, and must agree.
    reduce |= {name: lambda values: values[0] for name in ("log_prob_difference", "log_prob_difference_max")}
    return {name: reduce.get(name, jnp.mean)(values) for name, values in metrics.items()}


def make_rollout(
    policy_fn: PolicyFn,
    config: GRPOConfig,
    outside_fn: PolicyFn | None = None,
    shared_groups: int | None = None,
    prepare: Callable[[Any], Any] = lambda params: params,
    **jit_options: Any,
) -> Callable[..., Trajectory]:
    """A jitted `(params, lora, inputs, initial_noise [B, ...], key, sigmas [T + 1], part=None) -> Trajectory`.

    The key gives the window and the noise; with a `part`, a number, the noise is another one under the same window.
    `outside_fn` is the policy of deterministic steps (`guided_policies`).
    `shared_groups` says that the initial noise and the inputs are those of so many contiguous groups, the same within
    each: with a window, nothing is then computed twice before the samples part.
    `prepare` is applied to the frozen weights before anything else.
    """
    outside_fn = policy_fn if outside_fn is None else outside_fn
    shared = shared_groups is not None and config.window is not None

    def run(params, lora, inputs, initial_noise, key, sigmas, part=None):
        params = prepare(params)
        window_key, noise_key = jax.random.split(key)
        noise_key = noise_key if part is None else jax.random.fold_in(noise_key, part)
        bound = lambda fn: lambda x, sigma: fn(params, lora, x, sigma, inputs)
        policies = (policy_fn, outside_fn)
        shared_fns = tuple(bound(once_per_group(fn, shared_groups)) for fn in policies) if shared else None
        start = draw_window(window_key, config)
        velocity, outside = map(bound, policies)
        return rollout(velocity, initial_noise, noise_key, sigmas, config, start, outside, shared_fns)

    return jit_exactly(run, **jit_options)


def make_update(
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: GRPOConfig,
    prepare: Callable[[Any], Any] = lambda params: params,
    **jit_options: Any,
) -> Callable[..., tuple[PolicyState, dict[str, jax.Array]]]:
    """A jitted `(params, state, reference_lora, trajectory, advantages [B], inputs) -> (state, metrics)`.

    The reference policy is `policy_fn` with `reference_lora`, None for the bare weights. The samples are split
    into `updates_per_rollout` strided parts, each used for one optimizer step over all trained timesteps. Gradient
    clipping and the learning rate are the optimizer's. `prepare` is applied to the frozen weights before anything else.

    With `old_log_probs='trainer'` the first of them is on-policy by definition, whatever the trajectory's log-probabilities are:
    its old ones are its own, without gradient. For the others one forward pass with the parameters of before the first step
    runs first, over their samples alone. What it leaves is small, [U - 1, K, B / U] numbers; for `guard` also that many means,
    which is less than the rollout's.

    With `skip_zero_advantage` the loss is the mean over an update's other samples, in the same time; an update that has none is
    left out. Metrics are of all samples but for the loss.

    Metrics are float32 scalars. When a loss or gradient is not finite, `non_finite` is 1 and that optimizer step
    is left out, so the returned state is still the last good one; stopping is the caller's decision.

    Raises:
      ValueError: at the first call, when the batch cannot be split as configured.
    """
    updates = config.updates_per_rollout

    def run(params, state, reference_lora, trajectory, advantages, inputs):
        if advantages.shape[0] % updates:
            raise ValueError(
                f"{advantages.shape[0]} samples cannot be split into updates_per_rollout={updates} equal parts."
            )
        params = prepare(params)
        loss_fn = make_loss(policy_fn, params, reference_lora, trajectory.sigmas[1], config)

        def part(index):
            latents, log_probs, means = (
                _parts(values, index, updates, axis=1)
                for values in (trajectory.latents, trajectory.log_probs, trajectory.means)
            )
            return trajectory._replace(latents=latents, log_probs=log_probs, means=means)

        def before_first(index):
            own = _parts(inputs, index, updates)
            return old_policy(policy_fn, params, state.lora, part(index), own, config)

        later = None
        if config.old_log_probs == "trainer" and updates > 1:
            later = jax.lax.map(before_first, jnp.arange(1, updates))

        def old(index):
            if config.old_log_probs == "sampler":
                return None
            if later is None:
                return OldPolicy(None, None, True)
            own = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(index - 1, 0), keepdims=False), later
            )
            return own._replace(on_policy=index == 0)

        def update(state, index):
            own, weights, kept = _parts(advantages, index, updates), None, True
            if config.skip_zero_advantage:
                weights = (own != 0).astype(jnp.float32)
                kept = jnp.any(own != 0)
                weights = weights / jnp.where(kept, weights.mean(), 1.0)
            gradients, metrics = accumulate_gradients(
                loss_fn,
                state.lora,
                part(index),
                own,
                _parts(inputs, index, updates),
                config.micro_batch,
                old(index),
                weights,
            )
            summary = _summarize(metrics, optax.global_norm(gradients))
            gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.lora)
            changes, opt_state = optimizer.update(gradients, state.opt_state, state.lora)
            lora = optax.apply_updates(state.lora, changes)
            ema = ema_update(state.ema, lora, state.step, config.ema_decay, config.ema_interval)
            new = PolicyState(lora, opt_state, ema, state.step + 1)
            good = (summary["non_finite"] == 0) & kept
            return constrain_parameters(jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)), summary

        state, metrics = jax.lax.scan(update, state, jnp.arange(updates))
        return state, _combine(metrics)

    return jit_exactly(run, **jit_options)


def grpo_step_flops(
    forward: int, sampled: int, trained: int, reference: bool, old: int = 0, trains_weights: bool = False
) -> int:
    """One GRPO iteration: sampling, the policy's forward and backward pass, the forward passes of the reference and of the old policy.

    The backward pass of a LoRA policy is one more forward's worth: gradients go through the frozen matrices and not
    into them. Recomputed activations do not count, as usual for model FLOPs; neither do the VAE and text encoders.

    Args:
      forward: of one sample and branch, from `forward_flops`.
      sampled, trained: evaluations (samples x steps x branches of guidance) of the sampler and of the trainer.
      reference: whether a reference policy is evaluated.
      old: evaluations of the old policy by the trainer, whose log-probabilities the algorithm needs: those of all optimizer steps
        of a rollout but the first, or none where the sampler's are used.
      trains_weights: whether the transformer's own weights are trained instead of a LoRA: their gradients are one forward's worth more.
    """
    return forward * (sampled + trained * (2 + reference + trains_weights) + old)
