"""Flow-GRPO and its variants: policy gradients along the stochastic steps of a rollout, against ratios of their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unipic2_jax.flow.sde import SDEConfig, log_prob, sde_step_mean_std
from unipic2_jax.parallel.rules import constrain
from unipic2_jax.rl.algorithm import ALGORITHMS, Algorithm, Passes
from unipic2_jax.rl.config import GRPOConfig
from unipic2_jax.rl.gradients import (
    LossFn,
    accumulate,
    check_updates,
    count_micro_batches,
    first_in_parts,
    optimizer_step,
    take_part,
    when,
)
from unipic2_jax.rl.objective import grpo_loss
from unipic2_jax.rl.policy import PolicyFn, guided_policies, once_per_group
from unipic2_jax.rl.rollout import Trajectory, draw_window, jit_exactly, rollout


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


class OldPolicy(NamedTuple):
    """What ratios are taken against, in micro-batches in the order in which `accumulate_gradients` visits them: V of b samples."""

    log_probs: jax.Array | None  # [V, b] float32
    means: jax.Array | None  # [V, b, ...] float32; see `GRPOConfig.compares_means`
    on_policy: jax.Array | bool  # scalar: the policy is its own old one, and the rest is not looked at


def make_loss(policy_fn: PolicyFn, params: Any, reference_lora: Any, sigma_1: jax.Array, config: GRPOConfig) -> LossFn:
    """The loss of a micro-batch at one timestep, as `accumulate_gradients` wants it."""

    def loss_fn(lora: Any, batch: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
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
    parts = count_micro_batches(trajectory.latents.shape[1], micro_batch)

    def data(index: jax.Array) -> dict[str, Any]:
        step, part = trajectory.steps[index // parts], index % parts

        def at(values: jax.Array, offset: int = 0) -> jax.Array:
            return take_part(jax.lax.dynamic_index_in_dim(values, step + offset, keepdims=False), part, parts)

        return {
            "x": at(trajectory.latents),
            "x_next": at(trajectory.latents, 1),
            "log_prob": at(trajectory.log_probs),
            "mean": None if trajectory.means is None else at(trajectory.means),
            "sigma": trajectory.sigmas[step],
            "sigma_next": trajectory.sigmas[step + 1],
            **take_part(samples, part, parts),
        }

    return parts * trajectory.steps.shape[0], data


def old_policy(
    policy_fn: PolicyFn,
    params: Any,
    lora: Any,
    trajectory: Trajectory,
    inputs: Any,
    config: GRPOConfig,
    needed: jax.Array | None = None,
) -> OldPolicy:
    """The policy's log-probabilities by the trainer: a forward pass in the update's micro-batches, without gradients, of those that are
    `needed`."""
    count, data = _micro_batches(trajectory, {"inputs": inputs}, config.micro_batch)

    def compute(index: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        batch = data(index)
        x, sigma = batch["x"], batch["sigma"]
        velocity = policy_fn(params, lora, x, sigma, batch["inputs"])
        mean, std = sde_step_mean_std(velocity, x, sigma, batch["sigma_next"], trajectory.sigmas[1], config.sde)
        kept = constrain(mean, "batch", *[None] * (x.ndim - 1)) if config.compares_means else None
        return log_prob(batch["x_next"], mean, std, config.sde), kept

    visit = lambda at: when(at[1], lambda: compute(at[0]))
    log_probs, means = jax.lax.map(visit, (jnp.arange(count), needed))
    return OldPolicy(log_probs, means, on_policy=False)


def accumulate_gradients(
    loss_fn: LossFn,
    lora: Any,
    trajectory: Trajectory,
    advantages: jax.Array,
    inputs: Any,
    micro_batch: int | None = None,
    old: OldPolicy | None = None,
    weights: jax.Array | None = None,
    needed: jax.Array | None = None,
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
      needed: see `gradients.accumulate`.

    Returns:
      Gradients (float32, shaped like `lora`) and metrics [K, B], of the samples in the order they were visited.

    Raises:
      ValueError: when `micro_batch` does not divide B.
    """
    samples = {"advantage": advantages, "inputs": inputs, "weight": weights}
    count, data = _micro_batches(trajectory, samples, micro_batch)

    def batch_at(index: jax.Array, own: Any) -> dict[str, Any]:
        batch = data(index)
        if old is None:
            batch["old"] = OldPolicy(batch["log_prob"], batch["mean"], False)
        else:
            log_probs, means = own
            batch["old"] = OldPolicy(log_probs, means, old.on_policy)
        return batch

    scanned = None if old is None else (old.log_probs, old.means)
    gradients, metrics = accumulate(loss_fn, lora, batch_at, count, scanned, needed)
    return gradients, jax.tree.map(lambda m: m.reshape(trajectory.steps.shape[0], -1), metrics)


def _summarize(
    metrics: dict[str, jax.Array], gradient_norm: jax.Array, visited: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Scalars of one update from per-sample metrics [K, B], of the samples that were `visited`, bool [K, B] (None: of all)."""
    ratio = metrics.pop("ratio")
    difference = metrics.pop("log_prob_difference")
    loss = metrics.pop("loss")  # 0 for what was not visited, and a mean over all
    finite = jnp.isfinite(loss).all() & jnp.isfinite(gradient_norm)
    seen: dict[str, Any] = {} if visited is None else {"where": visited}
    return {
        "loss": loss.mean(),
        **{name: jnp.mean(values, **seen) for name, values in metrics.items()},
        "ratio_mean": ratio.mean(**seen),
        "ratio_min": ratio.min(**seen, initial=jnp.inf),
        "ratio_max": ratio.max(**seen, initial=-jnp.inf),
        "log_prob_difference": difference.mean(**seen),
        "log_prob_difference_max": difference.max(**seen, initial=0.0),
        "gradient_norm": gradient_norm,
        "non_finite": 1.0 - finite.astype(jnp.float32),
        **({"computed": jnp.mean(visited, dtype=jnp.float32)} if visited is not None else {}),
    }


def _combine(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scalars of a rollout's updates, each metric [U]."""
    reduce: dict[str, Callable[[jax.Array], jax.Array]] = {
        "ratio_min": jnp.min,
        "ratio_max": jnp.max,
        "non_finite": jnp.max,
    }
    # Only before the first optimizer step do sampler and trainer have the same policy, and must agree.
    reduce |= {name: lambda values: values[0] for name in ("log_prob_difference", "log_prob_difference_max")}
    return {name: reduce.get(name, jnp.mean)(values) for name, values in metrics.items()}


def make_rollout(
    policy_fn: PolicyFn,
    config: GRPOConfig,
    outside_fn: PolicyFn | None = None,
    shared_groups: int | None = None,
    prepare: Callable[[Any], Any] = lambda params: params,
    parts: int = 1,
    **jit_options: Any,
) -> Callable[..., Trajectory]:
    """A jitted `(params, lora, inputs, initial_noise [B, ...], key, sigmas [T + 1], part=None) -> Trajectory`.

    The key gives the window and the noise; with a `part`, a number, the noise is that part of what all `parts` would have together.
    `outside_fn` is the policy of deterministic steps (`guided_policies`).
    `shared_groups` says that the initial noise and the inputs are those of so many contiguous groups, the same within
    each: with a window, nothing is then computed twice before the samples part.
    `prepare` is applied to the frozen weights before anything else.
    """
    outside_fn = policy_fn if outside_fn is None else outside_fn
    groups = shared_groups if config.window is not None else None

    def run(
        params: Any,
        lora: Any,
        inputs: Any,
        initial_noise: jax.Array,
        key: jax.Array,
        sigmas: jax.Array,
        part: Any = None,
    ) -> Trajectory:
        params = prepare(params)
        window_key, noise_key = jax.random.split(key)
        rows = None if part is None else (part, parts)
        bound = lambda fn: lambda x, sigma: fn(params, lora, x, sigma, inputs)
        shared_fns = None
        if groups is not None:
            shared_fns = (bound(once_per_group(policy_fn, groups)), bound(once_per_group(outside_fn, groups)))
        start = draw_window(window_key, config)
        velocity = bound(policy_fn)
        return rollout(velocity, initial_noise, noise_key, sigmas, config, start, bound(outside_fn), shared_fns, rows)

    return jit_exactly(run, **jit_options)


def _old_of(index: jax.Array, later: OldPolicy | None, config: GRPOConfig) -> OldPolicy | None:
    """The old policy of update number `index`, as `accumulate_gradients` takes it; `later` are those of all updates but the first."""
    if config.old_log_probs == "sampler":
        return None
    if later is None:
        return OldPolicy(None, None, True)
    at = lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(index - 1, 0), keepdims=False)
    return jax.tree.map(at, later)._replace(on_policy=index == 0)


def _without_zeros(advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [B], with mean 1, of the samples whose advantage is not 0, and whether there are any."""
    weights, kept = (advantages != 0).astype(jnp.float32), jnp.any(advantages != 0)
    return weights / jnp.where(kept, weights.mean(), 1.0), kept


def _samples_of(trajectory: Trajectory, index: jax.Array, updates: int) -> Trajectory:
    """The samples of update number `index`."""
    return _of_samples(trajectory, lambda values: take_part(values, index, updates, axis=1))


def _of_samples(trajectory: Trajectory, change: Callable[[Any], Any]) -> Trajectory:
    """The trajectory with what it holds of samples, along axis 1, changed."""
    fields = ("latents", "log_probs", "means")
    return trajectory._replace(**{name: jax.tree.map(change, getattr(trajectory, name)) for name in fields})


class _Update(NamedTuple):
    """What one optimizer step is made of: samples, and for those that are left out what is computed and how the others count."""

    trajectory: Trajectory
    advantages: jax.Array  # [b]
    inputs: Any
    weights: jax.Array | None = None  # [b]
    kept: jax.Array | bool = True  # whether there is a sample at all
    needed: jax.Array | None = None  # bool [V], the micro-batches with a sample in them

    def visited(self) -> jax.Array | None:
        """Which samples are computed, bool [K, b], in the order of `accumulate_gradients`."""
        if self.needed is None:
            return None
        steps, samples = self.trajectory.steps.shape[0], self.advantages.shape[0]
        return jnp.repeat(self.needed, steps * samples // self.needed.shape[0]).reshape(steps, samples)


def _leaving_out(update: _Update, config: GRPOConfig, sorts: bool) -> _Update:
    """The update without passes for micro-batches in which no sample has an advantage.

    Args:
      sorts: whether samples may change places, so that those without advantage share micro-batches.
    """
    parts = count_micro_batches(update.advantages.shape[0], config.micro_batch)
    has_advantage = update.advantages != 0
    if sorts:
        order, count = first_in_parts(has_advantage, parts)
        rows = lambda axis: (
            lambda x: constrain(jnp.take(x, order, axis), *[None] * axis, "batch", *[None] * (x.ndim - axis - 1))
        )
        update = update._replace(
            trajectory=_of_samples(update.trajectory, rows(1)),
            **jax.tree.map(rows(0), {"advantages": update.advantages, "inputs": update.inputs}),
        )
        needed = jnp.arange(parts) < count
    else:
        needed = has_advantage.reshape(-1, parts).any(axis=0).at[0].set(True)
    weights, kept = _without_zeros(update.advantages)
    return update._replace(weights=weights, kept=kept, needed=jnp.tile(needed, update.trajectory.steps.shape[0]))


def make_update(
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: GRPOConfig,
    prepare: Callable[[Any], Any] = lambda params: params,
    sorts: bool = True,
    **jit_options: Any,
) -> Callable[..., tuple[PolicyState, dict[str, jax.Array]]]:
    """A jitted `(params, state, reference_lora, trajectory, advantages [B], inputs, key=None) -> (state, metrics)`.

    The reference policy is `policy_fn` with `reference_lora`, None for the bare weights. The samples are split
    into `updates_per_rollout` strided parts, each used for one optimizer step over all trained timesteps. Gradient
    clipping and the learning rate are the optimizer's. `prepare` is applied to the frozen weights before anything else.

    With `old_log_probs='trainer'` the first of them is on-policy by definition, whatever the trajectory's log-probabilities are:
    its old ones are its own, without gradient. For the others one forward pass with the parameters of before the first step
    runs first, over their samples alone. What it leaves is small, [U - 1, K, B / U] numbers; for `guard` and `trust='dppo'` also that
    many means, which is less than the rollout's.

    With `skip_zero_advantage` the loss is the mean over an update's other samples; an update that has none is left out. Samples are
    put in another order, so that those without advantage share micro-batches, of which no pass is computed (the first is always).
    Metrics are of the samples that were computed, and `computed` is their share. Where `sorts` is False they stay in their places.

    Metrics are float32 scalars. When a loss or gradient is not finite, `non_finite` is 1 and that optimizer step
    is left out, so the returned state is still the last good one; stopping is the caller's decision.

    Raises:
      ValueError: at the first call, when the batch cannot be split as configured.
    """
    updates = config.updates_per_rollout

    def run(
        params: Any,
        state: PolicyState,
        reference_lora: Any,
        trajectory: Trajectory,
        advantages: jax.Array,
        inputs: Any,
        key: Any = None,
    ) -> tuple[PolicyState, dict[str, jax.Array]]:
        del key  # nothing is drawn here
        check_updates(advantages.shape[0], updates)
        params = prepare(params)
        loss_fn = make_loss(policy_fn, params, reference_lora, trajectory.sigmas[1], config)

        def part(index: jax.Array) -> _Update:
            samples = _samples_of(trajectory, index, updates)
            own = _Update(samples, take_part(advantages, index, updates), take_part(inputs, index, updates))
            return _leaving_out(own, config, sorts) if config.skip_zero_advantage else own

        def before_first(index: jax.Array) -> OldPolicy:
            own = part(index)
            return old_policy(policy_fn, params, state.lora, own.trajectory, own.inputs, config, own.needed)

        later = None
        if config.old_log_probs == "trainer" and updates > 1:
            later = jax.lax.map(before_first, jnp.arange(1, updates))

        def update(state: PolicyState, index: jax.Array) -> tuple[PolicyState, dict[str, jax.Array]]:
            own = part(index)
            gradients, metrics = accumulate_gradients(
                loss_fn,
                state.lora,
                own.trajectory,
                own.advantages,
                own.inputs,
                config.micro_batch,
                _old_of(index, later, config),
                own.weights,
                own.needed,
            )
            summary = _summarize(metrics, optax.global_norm(gradients), own.visited())
            good = (summary["non_finite"] == 0) & own.kept
            return optimizer_step(state, gradients, optimizer, config.ema_decay, config.ema_interval, good), summary

        state, metrics = jax.lax.scan(update, state, jnp.arange(updates))
        return state, _combine(metrics)

    return jit_exactly(run, **jit_options)


@ALGORITHMS.register("grpo")
class GRPO(Algorithm):
    """Flow-GRPO with the variants of `GRPOConfig`."""

    name, Config, rollout_type = "grpo", GRPOConfig, Trajectory
    config: GRPOConfig

    @classmethod
    def fields(cls) -> dict[str, Any]:
        """A window is written as three numbers."""
        return {**super().fields(), "window": {"size": 0, "low": 0, "high": 0}}  # size 0: every step is stochastic

    @classmethod
    def read(cls, fields: dict[str, Any]) -> GRPOConfig:
        window = fields["window"]
        window = (window["size"], (window["low"], window["high"])) if window["size"] else None
        return GRPOConfig(**{**fields, "window": window, "sde": SDEConfig(**fields["sde"])})

    @property
    def shares_beginning(self) -> bool:
        """Samples of a group that share their first noise are one sample until the window's first step."""
        return self.layout.same_latent and self.config.window is not None

    @property
    def shares_update(self) -> bool:
        """They are in the trainer too where that step is the only one, and micro-batches take an equal part of every group."""
        return self.shares_beginning and self.config.trained_steps == 1 and self.micro_batch % self.layout.prompts == 0

    def init(self, trained: Any, optimizer: optax.GradientTransformation) -> PolicyState:
        return init_state(trained, optimizer)

    def make_rollout(self, network_fn: PolicyFn, **options: Any) -> Callable[..., Trajectory]:
        policy, outside = guided_policies(network_fn, self.config, self.layout.batch_branches)
        groups = self.layout.prompts_at_once if self.shares_beginning else None
        return make_rollout(policy, self.config, outside, groups, parts=self.layout.batches, **options)

    def make_update(
        self, network_fn: PolicyFn, optimizer: optax.GradientTransformation, **options: Any
    ) -> Callable[..., tuple[PolicyState, dict[str, jax.Array]]]:
        policy, _ = guided_policies(network_fn, self.config, self.layout.batch_branches)
        policy = once_per_group(policy, self.layout.prompts) if self.shares_update else policy
        # One evaluation for a group wants an equal part of every group in each micro-batch.
        return make_update(policy, optimizer, self.config, sorts=not self.shares_update, **options)

    def first_step(self, rollout: Trajectory) -> int:
        """The window's."""
        return int(jax.device_get(rollout.steps)[0])

    def passes(self, first_step: int | None = None) -> Passes:
        config, samples, prompts = self.config, self.layout.samples, self.layout.prompts
        if first_step is None:
            first_step = 0 if config.window is None else sum(config.window[1]) // 2
        branches = 1 if config.guidance_scale == 1 else 2
        inside = branches if config.cfg_in_window else 1
        sampled = samples * ((config.num_steps - config.trained_steps) * branches + config.trained_steps * inside)
        if self.shares_beginning:
            sampled -= (samples - prompts) * (first_step * branches + inside)
        trained = samples * config.trained_steps * inside
        if self.shares_update:
            trained = samples // self.micro_batch * prompts * inside
        updates, watched = config.updates_per_rollout, trained * (config.kl_beta > 0)
        if config.old_log_probs == "trainer":  # of all updates but the first
            watched += trained // updates * (updates - 1)
        return Passes(sampled, trained, watched)

    def remark(self, metrics: Mapping[str, float]) -> str | None:
        """Sampler and trainer differ by more than ratios may."""
        difference, config = metrics["log_prob_difference"], self.config
        if not difference > config.clip_range:
            return None
        advice = (
            "no ratio depends on it, so that rounding to bfloat16 does no harm; when the run computes in float32, look for what "
            "rollout and update do differently"
            if config.old_log_probs == "trainer"
            else "samples are clipped that no update has moved; set grpo.old_log_probs='trainer' or compute in float32"
        )
        return (
            f"log_prob_difference between sampler and trainer is {difference:.1e}, above "
            f"grpo.clip_range = {config.clip_range:.0e}; {advice}."
        )
