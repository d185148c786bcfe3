"""Policies: the transformer under the weights that are trained, with guidance, and once for what a group shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipic2_jax.flow import guidance
from unipic2_jax.models import sampling
from unipic2_jax.models.lora import scaled
from unipic2_jax.optim.optimizer import merge_params
from unipic2_jax.rl.config import GRPOConfig

# (params, lora or None, latents [B, ...], sigma scalar or [B], inputs with leading axis B) -> velocity [B, ...].
# `params` are the frozen weights: an argument, because a jitted function would bake closed-over weights into itself.
PolicyFn = Callable[[Any, Any, jax.Array, jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class PolicyNetwork:
    """The transformer as a `PolicyFn`; its inputs are one branch's conditioning: 'context', 'pooled' and maybe 'references'.

    Attributes:
      scale: what the LoRA is multiplied by; None: there is none, and what is trained are parameters of the transformer.
    """

    transformer: nn.Module
    scale: float | None
    num_train_timesteps: int

    def weights(self, params: Any, trained: Any) -> tuple[Any, Any]:
        """The transformer's parameters and LoRA that a tree of what is trained means; None is the reference."""
        if trained is None:
            return params, None
        return (merge_params(trained, params), None) if self.scale is None else (params, scaled(trained, self.scale))

    def __call__(self, params: Any, trained: Any, latents: jax.Array, sigma: jax.Array, inputs: Any) -> jax.Array:
        conditioning = (inputs["context"], inputs["pooled"])
        params, lora = self.weights(params, trained)
        velocity = sampling.velocity_fn(
            self.transformer,
            params,
            conditioning,
            inputs.get("references"),
            lora=lora,
            num_train_timesteps=self.num_train_timesteps,
        )
        return velocity(latents, sigma)


def conditional_policy(network_fn: PolicyFn) -> PolicyFn:
    """The policy without guidance, float32, of `inputs = {'cond': tree}`."""

    def policy(params: Any, lora: Any, latents: jax.Array, sigma: jax.Array, inputs: Any) -> jax.Array:
        return network_fn(params, lora, latents, sigma, inputs["cond"]).astype(jnp.float32)

    return policy


def guided_policies(
    network_fn: PolicyFn, config: GRPOConfig, batch_branches: bool = False
) -> tuple[PolicyFn, PolicyFn]:
    """The policy of stochastic steps and the one of deterministic steps, which differ with `cfg_in_window=False`.

    Args:
      network_fn: one network evaluation; its `inputs` are one branch's conditioning.
      config: says how strong guidance is, where it applies and whether its unconditional branch is differentiated.
      batch_branches: evaluate both branches in one call of twice the batch (half the program to compile, twice the
        activations, and no saving from `stop_gradient_uncond`).

    Returns:
      (policy_fn, outside_fn). Both take `inputs = {'cond': tree, 'uncond': tree}` with equal leaf shapes; 'uncond'
      may be absent when no guidance is used.
    """

    cond_only = conditional_policy(network_fn)

    def guided(params: Any, lora: Any, latents: jax.Array, sigma: jax.Array, inputs: Any) -> jax.Array:
        if not batch_branches:
            uncond, cond = (network_fn(params, lora, latents, sigma, inputs[name]) for name in ("uncond", "cond"))
        else:
            # Interleaved rather than concatenated: a batch split over devices then stays where it is.
            def pair(uncond: jax.Array, cond: jax.Array) -> jax.Array:
                return jnp.stack([uncond, cond], axis=1).reshape((-1,) + cond.shape[1:])

            sigmas = jnp.broadcast_to(sigma, latents.shape[:1])
            both = jax.tree.map(pair, inputs["uncond"], inputs["cond"])
            velocity = network_fn(params, lora, pair(latents, latents), pair(sigmas, sigmas), both)
            velocity = velocity.reshape((-1, 2) + velocity.shape[1:])
            uncond, cond = velocity[:, 0], velocity[:, 1]
        return guidance.combine(uncond, cond, config.guidance_scale, config.stop_gradient_uncond)

    outside = guided if guidance.needs_uncond(config.guidance_scale) else cond_only
    return (outside if config.cfg_in_window else cond_only), outside


def once_per_group(policy_fn: PolicyFn, groups: int) -> PolicyFn:
    """The same policy for a batch in which each of `groups` contiguous groups is one sample many times over.

    Where a group shares its first noise that is so up to its first stochastic step, and at that step in training too:
    the samples differ by the noise that is added after the network. One evaluation then serves the whole group.
    """

    def policy(params: Any, lora: Any, latents: jax.Array, sigma: jax.Array, inputs: Any) -> jax.Array:
        copies = latents.shape[0] // groups
        if latents.shape[0] != groups * copies or not copies:
            raise ValueError(f"{latents.shape[0]} samples cannot be {groups} groups of equal size.")
        first = lambda x: x.reshape(groups, copies, *x.shape[1:])[:, 0] if jnp.ndim(x) else x
        velocity = policy_fn(params, lora, first(latents), first(sigma), jax.tree.map(first, inputs))
        return jnp.repeat(velocity, copies, axis=0)

    return policy
