"""Two blocks as wide as SD3.5-Medium's in bfloat16: a policy that has not moved has ratios of exactly 1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unipic2_jax.flow.schedule import sigmas as make_sigmas
from unipic2_jax.models.sampling import velocity_fn
from unipic2_jax.models.sd3.lora import init_lora
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.rl.config import GRPOConfig
from unipic2_jax.rl.grpo import init_state, make_rollout, make_update
from unipic2_jax.rl.policy import guided_policies

WIDE = MMDiTConfig(
    sample_size=8,
    num_layers=2,
    dual_attention_layers=(0,),
    joint_attention_dim=32,
    pooled_projection_dim=32,
    pos_embed_max_size=4,
)
# Rollouts of four samples, passes of one: the two programs have other shapes.
CONFIG = GRPOConfig(num_steps=2, group_size=4, guidance_scale=1.0, kl_beta=0.0, updates_per_rollout=2, micro_batch=1)
BATCH = 4


@pytest.fixture(scope="module")
def world():
    """(policy, arguments of a rollout, its trajectory)."""
    module = MMDiT(WIDE, dtype=jnp.bfloat16, remat="full")
    assert (WIDE.width, WIDE.num_attention_heads) == (1536, 24)
    keys = jax.random.split(jax.random.key(0), 6)
    noise = jax.random.normal(keys[0], (BATCH, 8, 8, WIDE.in_channels))
    inputs = {
        "context": jax.random.normal(keys[1], (BATCH, 8, WIDE.joint_attention_dim)),
        "pooled": jax.random.normal(keys[2], (BATCH, WIDE.pooled_projection_dim)),
    }
    shapes = jax.eval_shape(module.init, keys[3], noise[:1], jnp.zeros(1), inputs["context"][:1], inputs["pooled"][:1])[
        "params"
    ]
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32) * 0.03
        return jnp.asarray(values, jnp.bfloat16)

    params = jax.tree.map(draw, shapes)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.03),
        jax.eval_shape(lambda weights: init_lora(keys[4], weights, 4), params),
    )

    def network(params, lora, latents, sigma, inputs):
        return velocity_fn(module, params, (inputs["context"], inputs["pooled"]), lora=lora)(latents, sigma)

    policy, _ = guided_policies(network, CONFIG)
    arguments = (params, lora, {"cond": inputs}, noise, keys[5], make_sigmas(CONFIG.num_steps, 3.0))
    return policy, arguments, make_rollout(policy, CONFIG)(*arguments)


def updated(world, **fields):
    """Metrics of updates that leave the policy where it is."""
    policy, (params, lora, inputs, *_), trajectory = world
    optimizer = optax.sgd(0.0)
    update = make_update(policy, optimizer, dataclasses.replace(CONFIG, **fields))
    advantages = jnp.array([1.0, -1.0, 0.5, -0.5])
    state, metrics = update(params, init_state(lora, optimizer), None, trajectory, advantages, inputs)
    assert int(state.step) == fields.get("updates_per_rollout", CONFIG.updates_per_rollout)
    return {name: float(value) for name, value in metrics.items()}


def test_ratios_are_one_in_both_updates(world):
    """In the second too, which compares with the forward pass of before the first."""
    metrics = updated(world)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["gradient_norm"] > 0


def test_the_samplers_log_probabilities_clip_before_anything_has_moved(world):
    metrics = updated(world, old_log_probs="sampler", updates_per_rollout=1)
    assert metrics["clip_fraction"] >= 0.25 and metrics["log_prob_difference"] > CONFIG.clip_range
