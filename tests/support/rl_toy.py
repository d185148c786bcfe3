"""A two-layer policy on small latents, shared by the tests of this folder (and by their subprocess)."""

import jax
import jax.numpy as jnp

DIM, HIDDEN, CONTEXT = 2, 16, 3


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "in": jax.random.normal(keys[0], (DIM + CONTEXT + 1, HIDDEN)) * 0.5,
        "out": jax.random.normal(keys[1], (HIDDEN, DIM)) * 0.5,
    }
    lora = {
        "a": jax.random.normal(keys[2], (DIM + CONTEXT + 1, 4)) * 0.5,
        "b": jnp.zeros((4, HIDDEN)),
        "bias": jnp.zeros(DIM),
    }
    return params, lora


def perturb(lora, seed=1, scale=0.3):
    """A lora whose effect is not zero."""
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def network(params, lora, latents, sigma, inputs):
    """latents [B, DIM], inputs {'context': [B, CONTEXT]} -> velocity [B, DIM]."""
    sigma = jnp.broadcast_to(sigma, latents.shape[:1])[:, None]
    features = jnp.concatenate([latents, inputs["context"], sigma], axis=-1)
    kernel = params["in"] if lora is None else params["in"] + lora["a"] @ lora["b"]
    # The pull towards 0 makes even the untrained network a sensible sampler.
    velocity = 0.3 * jnp.tanh(features @ kernel) @ params["out"] + latents
    return velocity if lora is None else velocity + lora["bias"]


def make_inputs(batch, seed=2):
    return {"context": jax.random.normal(jax.random.key(seed), (batch, CONTEXT))}
