"""DiffusionNFT (arXiv 2509.16117): rewards act on noised copies of finished samples, so that no sampler's step needs a probability.

Samples are drawn by an ODE solver from an *old* policy, and only the finished latents are kept. On a noised copy `x` of one, the
velocity `v` that is trained is mixed with the old one to a positive and an implicit negative one,

    v+ = b v + (1 - b) v_old        v- = (1 + b) v_old - b v        x0+- = x - sigma v+-

and, by how good the sample was within its group, r in [0, 1], either is asked to lead back to the sample:

    L = A_max / b (r mean (x0+ - x0)^2 / w+ + (1 - r) mean (x0- - x0)^2 / w-) + kl_beta mean (v - v_ref)^2
    w+- = mean |x0+- - x0|, without gradient, at least 1e-5        r = clip(1/2 + A / (2 A_max), 0, 1)

After each rollout's updates the old policy follows the new one: old <- d old + (1 - d) new, with d growing from 0. Constants and
choices are those of NVlabs/DiffusionNFT (scripts/train_nft_sd3.py, config/nft.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unipic2_jax.flow.ode import SOLVERS, sample_ode
from unipic2_jax.flow.path import interpolate, predict_x0
from unipic2_jax.parallel.rules import constrain, constrain_parameters
from unipic2_jax.rl.algorithm import ALGORITHMS, Algorithm, Passes
from unipic2_jax.rl.config import RLConfig
from unipic2_jax.rl.gradients import (
    LossFn,
    accumulate,
    check_updates,
    count_micro_batches,
    optimizer_step,
    take_part,
)
from unipic2_jax.rl.policy import PolicyFn, conditional_policy

LEAST_WEIGHT = 1e-5  # of w+-, where a prediction is right


@dataclasses.dataclass(frozen=True)
class NFTConfig(RLConfig):
    """Hyper-parameters of DiffusionNFT; defaults are those of its GenEval run.

    Each sample is trained at `trained_steps` of the rollout's T noise levels, drawn anew for every sample.

    Raises:
      ValueError: when a field is out of range.
    """

    title: ClassVar[str] = "NFT"

    group_size: int = 24
    guidance_scale: float = 1.0  # the algorithm has no guided policy
    global_std: bool = True
    kl_beta: float = 1e-4
    updates_per_rollout: int = 1
    ema_interval: int = 1
    solver: str = "dpm2"  # of the rollout; one of flow.ode.SOLVERS
    beta: float = 1.0  # b. The reference takes 0.1 for OCR and for several rewards at once
    # d after n optimizer steps: 0 before `old_flat`, then min(old_rate (n - old_flat), old_max).
    old_flat: int = 0
    old_rate: float = 1e-3
    old_max: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require = self.require
        require(
            self.guidance_scale == 1,
            f"guidance_scale is {self.guidance_scale}; DiffusionNFT samples and trains without guidance, which is 1",
        )
        require(self.solver in SOLVERS, f"solver is {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        require(0 < self.beta <= 1, f"beta is {self.beta}; it must lie in (0, 1]")
        require(self.old_flat >= 0, f"old_flat is {self.old_flat}; it must be 0 or more")
        require(self.old_rate >= 0, f"old_rate is {self.old_rate}; it must be 0 or more")
        require(0 <= self.old_max < 1, f"old_max is {self.old_max}; it must lie in [0, 1)")


class NFTState(NamedTuple):
    """What changes during a stage; a plain pytree, so it can be saved whole."""

    lora: Any
    opt_state: Any
    ema: Any  # like lora, float32
    step: jax.Array  # optimizer steps so far, int32
    old: Any  # like lora: what samples are drawn from


class Finished(NamedTuple):
    """What a rollout leaves for training."""

    latents: jax.Array  # [B, ...] float32, of images
    sigmas: jax.Array  # [T + 1] float32, the noise levels they were sampled at

    @staticmethod
    def batch_axes() -> dict[str, int | None]:
        return {"latents": 0, "sigmas": None}

    @property
    def finished(self) -> jax.Array:
        """The samples, [B, ...]."""
        return self.latents


def init_state(lora: Any, optimizer: optax.GradientTransformation) -> NFTState:
    """The state before the first update: the moving average and the old policy are the parameters, in their own buffers."""
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), lora)
    step = jnp.zeros((), jnp.int32)
    return NFTState(jax.tree.map(jnp.copy, lora), optimizer.init(lora), ema, step, jax.tree.map(jnp.copy, lora))


def optimality(advantage: jax.Array, config: NFTConfig) -> jax.Array:
    """r, how likely a sample counts as good: `clip(1/2 + A / (2 A_max), 0, 1)`, shaped like the advantage."""
    return jnp.clip(0.5 + advantage / (2.0 * config.adv_clip_max), 0.0, 1.0)


def old_share(step: jax.Array, config: NFTConfig) -> jax.Array:
    """d, what the old policy keeps of itself after `step` optimizer steps, float32 scalar."""
    passed = jnp.asarray(step, jnp.float32) - config.old_flat
    return jnp.where(passed < 0, 0.0, jnp.minimum(config.old_rate * passed, config.old_max))


def noise_levels(keys: jax.Array, sigmas: jax.Array, config: NFTConfig) -> jax.Array:
    """The noise levels that each sample is trained at: [K, B] of the T at which networks were asked, none twice for a sample.

    Args:
      keys: [B], a key for each sample.
      sigmas: [T + 1]; the last, where nothing was asked, is left out.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (config.num_steps,)))(keys)
    return sigmas[jnp.argsort(draws, axis=1)[:, : config.trained_steps]].T


def _per_sample(x: jax.Array) -> jax.Array:
    """Mean over everything but the batch: [B]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _denoising_loss(x0: jax.Array, x: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """`mean (x - sigma v - x0)^2`, divided by its own size: [B]."""
    error = predict_x0(x, velocity, sigma) - x0
    weight = jnp.maximum(_per_sample(jnp.abs(error)), LEAST_WEIGHT)
    return _per_sample(jnp.square(error)) / jax.lax.stop_gradient(weight)


def nft_loss(
    velocity: jax.Array,
    old_velocity: jax.Array,
    reference_velocity: jax.Array | None,
    x0: jax.Array,
    x: jax.Array,
    sigma: jax.Array,
    good: jax.Array,
    config: NFTConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective of this module's docstring for a batch of samples, each at one noise level. float32.

    Args:
      velocity, old_velocity, reference_velocity: [B, ...] at (`x`, `sigma`). Gradient flows to the first alone; the last is None
        when `kl_beta` is 0.
      x0, x: [B, ...], samples and their noised copies.
      sigma, good: [B], noise levels, and r of `optimality`.

    Returns:
      Loss [B] and metrics, each [B].

    Raises:
      ValueError: when the config needs the reference velocity and it is None.
    """
    if config.kl_beta and reference_velocity is None:
        raise ValueError(f"kl_beta is {config.kl_beta} but there is no reference velocity; give one or set it to 0.")
    velocity, x0 = velocity.astype(jnp.float32), x0.astype(jnp.float32)
    old = jax.lax.stop_gradient(old_velocity.astype(jnp.float32))
    positive = _denoising_loss(x0, x, config.beta * velocity + (1.0 - config.beta) * old, sigma)
    negative = _denoising_loss(x0, x, (1.0 + config.beta) * old - config.beta * velocity, sigma)
    loss = config.adv_clip_max / config.beta * (good * positive + (1.0 - good) * negative)
    metrics = {"policy_loss": loss, "old_difference": _per_sample(jnp.square(velocity - old))}
    if reference_velocity is not None and config.kl_beta:
        reference = jax.lax.stop_gradient(reference_velocity.astype(jnp.float32))
        metrics["kl"] = _per_sample(jnp.square(velocity - reference))
        loss = loss + config.kl_beta * metrics["kl"]
    return loss, metrics | {"loss": loss}


def make_loss(policy_fn: PolicyFn, params: Any, old_lora: Any, reference_lora: Any, config: NFTConfig) -> LossFn:
    """The loss of a micro-batch at one noise level a sample, as `gradients.accumulate` wants it."""

    def loss_fn(lora: Any, batch: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        given = batch["x"], batch["sigma"], batch["inputs"]
        old = policy_fn(params, old_lora, *given)
        reference = policy_fn(params, reference_lora, *given) if config.kl_beta else None
        velocity = policy_fn(params, lora, *given)
        terms = (batch["x0"], batch["x"], batch["sigma"], batch["good"], config)
        loss, metrics = nft_loss(velocity, old, reference, *terms)
        return jnp.mean(loss), metrics

    return loss_fn


def _micro_batches(
    samples: dict[str, Any], config: NFTConfig
) -> tuple[int, Callable[[jax.Array, Any], dict[str, Any]]]:
    """How many micro-batches an optimizer step has, and the one of a number.

    Args:
      samples: of an optimizer step, leading axis B: 'x0', 'good', 'inputs', 'key', and 'levels' [K, B].

    Raises:
      ValueError: when `micro_batch` does not divide B.
    """
    levels = samples.pop("levels")
    parts = count_micro_batches(levels.shape[1], config.micro_batch)

    def batch_at(index: jax.Array, _: Any) -> dict[str, Any]:
        step, part = index // parts, index % parts
        own = take_part(samples, part, parts)
        sigma = take_part(jax.lax.dynamic_index_in_dim(levels, step, keepdims=False), part, parts)
        # By a key of each sample's own, so that neither micro-batches nor devices change what is drawn.
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, step), own["x0"].shape[1:], jnp.float32)
        x = interpolate(own["x0"], jax.vmap(draw)(own.pop("key")), sigma)
        return {**own, "sigma": sigma, "x": constrain(x, "batch", *[None] * (x.ndim - 1))}

    return parts * config.trained_steps, batch_at


def _summarize(metrics: dict[str, jax.Array], gradient_norm: jax.Array) -> dict[str, jax.Array]:
    """Scalars of one update from metrics of its samples."""
    finite = jnp.isfinite(metrics["loss"]).all() & jnp.isfinite(gradient_norm)
    return {
        **{name: jnp.mean(values) for name, values in metrics.items()},
        "gradient_norm": gradient_norm,
        "non_finite": 1.0 - finite.astype(jnp.float32),
    }


def make_rollout(
    policy_fn: PolicyFn,
    config: NFTConfig,
    prepare: Callable[[Any], Any] = lambda params: params,
    **jit_options: Any,
) -> Callable[..., Finished]:
    """A jitted `(params, lora, inputs, initial_noise [B, ...], key, sigmas [T + 1], part=None) -> Finished`.

    Nothing is random but the noise that is given: `key` and `part` are what other algorithms need. `prepare` is applied to the
    frozen weights before anything else.
    """

    def run(
        params: Any,
        lora: Any,
        inputs: Any,
        initial_noise: jax.Array,
        key: jax.Array,
        sigmas: jax.Array,
        part: Any = None,
    ) -> Finished:
        del key, part
        params, sigmas = prepare(params), jnp.asarray(sigmas, jnp.float32)
        velocity = lambda x, sigma: policy_fn(params, lora, x, sigma, inputs)
        latents = sample_ode(velocity, initial_noise, sigmas, config.solver)
        return Finished(constrain(latents, "batch", *[None] * (latents.ndim - 1)), sigmas)

    return jax.jit(run, **jit_options)


def make_update(
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: NFTConfig,
    prepare: Callable[[Any], Any] = lambda params: params,
    good_fn: Callable[[jax.Array, NFTConfig], jax.Array] = optimality,
    **jit_options: Any,
) -> Callable[..., tuple[NFTState, dict[str, jax.Array]]]:
    """A jitted `(params, state, reference_lora, finished, advantages [B], inputs, key) -> (state, metrics)`.

    The samples are split into `updates_per_rollout` strided parts, each used for one optimizer step; then the old policy moves.
    Noise and noise levels come from the key. The reference policy is `policy_fn` with `reference_lora`, None for the bare
    weights. `good_fn` is the r of an advantage.

    Metrics are float32 scalars. When a loss or gradient is not finite, `non_finite` is 1 and that optimizer step is left out.

    Raises:
      ValueError: at the first call, when the batch cannot be split as configured.
    """
    updates = config.updates_per_rollout

    def run(
        params: Any,
        state: NFTState,
        reference_lora: Any,
        finished: Finished,
        advantages: jax.Array,
        inputs: Any,
        key: jax.Array,
    ) -> tuple[NFTState, dict[str, jax.Array]]:
        check_updates(advantages.shape[0], updates)
        loss_fn = make_loss(policy_fn, prepare(params), state.old, reference_lora, config)
        keys = jax.random.split(key, (2, advantages.shape[0]))
        good = good_fn(advantages, config)
        samples = {"x0": finished.latents, "good": good, "inputs": inputs, "key": keys[0]}
        levels = noise_levels(keys[1], finished.sigmas, config)

        def update(state: NFTState, index: jax.Array) -> tuple[NFTState, dict[str, jax.Array]]:
            own = take_part(samples, index, updates) | {"levels": take_part(levels, index, updates, axis=1)}
            count, batch_at = _micro_batches(own, config)
            gradients, metrics = accumulate(loss_fn, state.lora, batch_at, count)
            summary = _summarize(metrics, optax.global_norm(gradients))
            taken = summary["non_finite"] == 0
            return optimizer_step(state, gradients, optimizer, config.ema_decay, config.ema_interval, taken), summary

        new, metrics = jax.lax.scan(update, state, jnp.arange(updates))
        share = jnp.where(new.step == state.step, 1.0, old_share(new.step, config))
        old = jax.tree.map(lambda a, b: (share * a + (1.0 - share) * b).astype(a.dtype), state.old, new.lora)
        scalars = {name: values.max() if name == "non_finite" else values.mean() for name, values in metrics.items()}
        return new._replace(old=constrain_parameters(old)), scalars | {"old_share": share}

    return jax.jit(run, **jit_options)


@ALGORITHMS.register("nft")
class NFT(Algorithm):
    """DiffusionNFT."""

    name, Config, rollout_type = "nft", NFTConfig, Finished
    stage_defaults: ClassVar[Mapping[str, Any]] = {
        "num_prompts": 48,
        "optimizer": {"name": "adamw", "weight_decay": 1e-4},
    }
    config: NFTConfig

    def __post_init__(self) -> None:
        if self.layout.same_latent:
            raise ValueError(
                "same_latent gives the samples of a group one noise, from which an ODE makes one picture; switch it off for nft."
            )

    def init(self, trained: Any, optimizer: optax.GradientTransformation) -> NFTState:
        return init_state(trained, optimizer)

    def behaviour(self, state: NFTState) -> Any:
        return state.old

    def make_rollout(self, network_fn: PolicyFn, **options: Any) -> Callable[..., Finished]:
        return make_rollout(conditional_policy(network_fn), self.config, **options)

    def make_update(
        self, network_fn: PolicyFn, optimizer: optax.GradientTransformation, **options: Any
    ) -> Callable[..., tuple[NFTState, dict[str, jax.Array]]]:
        return make_update(conditional_policy(network_fn), optimizer, self.config, **options)

    def passes(self, first_step: int | None = None) -> Passes:
        del first_step
        trained = self.layout.samples * self.config.trained_steps
        return Passes(self.layout.samples * self.config.num_steps, trained, trained * (1 + (self.config.kl_beta > 0)))
