"""Rollouts and updates: on-policy ratios, accumulation, windows, devices, and a policy that learns."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rl_toy import DIM, make_inputs, make_params, network, perturb

from unipic2_jax.flow.ode import sample_ode
from unipic2_jax.flow.schedule import sigmas as make_sigmas
from unipic2_jax.flow.sde import SDEConfig
from unipic2_jax.rl.advantages import group_advantages
from unipic2_jax.rl.config import OLD_LOG_PROBS, GRPOConfig
from unipic2_jax.rl.grpo import OldPolicy, accumulate_gradients, init_state, make_loss, make_rollout, make_update
from unipic2_jax.rl.policy import guided_policies, once_per_group
from unipic2_jax.rl.rollout import draw_window, jit_exactly, rollout

STEPS, BATCH = 6, 8
SIGMAS = make_sigmas(STEPS, 3.0)
BASE = GRPOConfig(num_steps=STEPS, group_size=4, guidance_scale=1.0, updates_per_rollout=1, ema_interval=1)
PARAMS, LORA = make_params()
INPUTS = make_inputs(BATCH)
NOISE = jax.random.normal(jax.random.key(3), (BATCH, DIM))
ADVANTAGES = jnp.array([1.0, -1.0, 0.5, 0.0, 2.0, -2.0, -0.3, 0.7])
KEY = jax.random.key(4)


def sample(config, lora=LORA, key=KEY):
    return make_rollout(network, config)(PARAMS, lora, INPUTS, NOISE, key, SIGMAS)


@functools.partial(jax.jit, static_argnames=("config", "micro_batch"))
def gradients_of(config, trajectory, lora=LORA, micro_batch=None):
    loss_fn = make_loss(network, PARAMS, None, SIGMAS[1], config)
    return accumulate_gradients(loss_fn, lora, trajectory, ADVANTAGES, INPUTS, micro_batch)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("guard", (False, True))
@pytest.mark.parametrize("micro_batch", (None, 2))
def test_sampler_and_trainer_agree(micro_batch, guard):
    config = dataclasses.replace(BASE, micro_batch=micro_batch, guard=guard, kl_beta=0.0, old_log_probs="sampler")
    lora = perturb(LORA)
    trajectory = sample(config, lora)
    _, metrics = gradients_of(config, trajectory, lora, micro_batch=micro_batch)
    assert metrics["ratio"].shape == (5, BATCH)
    assert np.abs(metrics["log_prob_difference"]).max() <= 1e-6
    assert np.abs(metrics["ratio"] - 1).max() <= 1e-6 and metrics["clip_fraction"].max() == 0
    # Another policy is told apart by the same metric.
    _, other = gradients_of(config, trajectory, LORA)
    assert np.abs(other["log_prob_difference"]).max() > 1e-3


def test_accumulation_equals_one_big_batch():
    config = dataclasses.replace(BASE, kl_beta=0.5, clip_range=0.1)
    trajectory, lora = sample(config), perturb(LORA, scale=0.05)
    loss_fn = make_loss(network, PARAMS, None, SIGMAS[1], config)

    def whole(lora):
        losses = [
            loss_fn(
                lora,
                {
                    "x": trajectory.latents[k],
                    "x_next": trajectory.latents[k + 1],
                    "log_prob": trajectory.log_probs[k],
                    "old": OldPolicy(trajectory.log_probs[k], None, False),
                    "advantage": ADVANTAGES,
                    "weight": None,
                    "inputs": INPUTS,
                    "sigma": SIGMAS[k],
                    "sigma_next": SIGMAS[k + 1],
                },
            )[0]
            for k in range(STEPS - 1)
        ]
        return sum(losses) / len(losses)

    value, expected = jax.jit(jax.value_and_grad(whole))(lora)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected))
    for micro_batch in (None, 4, 2, 1):
        gradients, metrics = gradients_of(config, trajectory, lora, micro_batch=micro_batch)
        assert_trees_close(gradients, expected, rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(metrics["loss"].mean(), value, rtol=1e-4)
    with pytest.raises(ValueError, match="micro_batch 3 does not divide the 8"):
        gradients_of(config, trajectory, lora, micro_batch=3)


def test_kl_pulls_the_policy_back():
    config = dataclasses.replace(BASE, kl_beta=1.0)
    lora = perturb(LORA)
    trajectory = sample(config, lora)
    update = make_update(network, optax.sgd(3.0), config, compiler_options={"xla_backend_optimization_level": 3})
    state, kls = init_state(lora, optax.sgd(3.0)), []
    for _ in range(5):
        state, metrics = update(PARAMS, state, None, trajectory, jnp.zeros(BATCH), INPUTS)
        kls.append(float(metrics["kl"]))
    assert kls[-1] < 0.7 * kls[0] and kls[0] > 0
    # A reference equal to the policy costs nothing. Only an optimising compiler rounds both of them the same way.
    _, metrics = update(PARAMS, init_state(lora, optax.sgd(3.0)), lora, trajectory, jnp.zeros(BATCH), INPUTS)
    assert metrics["kl"] == 0 and metrics["gradient_norm"] == 0


def test_failed_sample_does_not_push():
    """Advantage 0 means no gradient from that sample, so its latents and reward do not matter."""
    config = dataclasses.replace(BASE, kl_beta=0.0)
    trajectory = sample(config)
    advantages, _ = group_advantages(np.array([[1.0, 0.0, np.nan, 0.5], [0.3, 0.2, 0.1, 0.9]]))
    loss_fn = make_loss(network, PARAMS, None, SIGMAS[1], config)
    other = trajectory._replace(latents=trajectory.latents.at[1:, 2].add(0.1))
    first, second = (
        accumulate_gradients(loss_fn, LORA, t, jnp.asarray(advantages.reshape(-1)), INPUTS)[0]
        for t in (trajectory, other)
    )
    assert_trees_close(first, second, rtol=1e-6)
    assert optax.global_norm(first) > 0


def test_window_is_stochastic_and_trained_only_inside():
    config = dataclasses.replace(BASE, window=(2, (1, 5)))
    velocity = lambda x, sigma: network(PARAMS, LORA, x, sigma, INPUTS)
    run = jax.jit(lambda key, start: rollout(velocity, NOISE, key, SIGMAS, config, start))
    first, second = run(jax.random.key(0), 2), run(jax.random.key(1), 2)
    np.testing.assert_array_equal(first.steps, [2, 3])
    assert (np.abs(first.log_probs).min(axis=1) > 0).tolist() == [False, False, True, True, False, False]
    # Up to the window the samples are the ODE's, whatever the key; from its first step on they differ.
    np.testing.assert_array_equal(first.latents[:3], second.latents[:3])
    assert (np.abs(first.latents[3:] - second.latents[3:]).min(axis=(1, 2)) > 0).all()
    np.testing.assert_allclose(first.latents[2], sample_ode(velocity, NOISE, SIGMAS[:3]), rtol=1e-5)
    np.testing.assert_allclose(first.latents[-1], sample_ode(velocity, first.latents[4], SIGMAS[4:]), rtol=1e-5)

    # Spoiling everything outside the window does not change the gradient; inside it does.
    gradients, metrics = gradients_of(config, first)
    assert metrics["loss"].shape == (2, BATCH)
    latents = first.latents.at[:2].set(jnp.nan).at[5:].set(jnp.nan)
    spoiled = first._replace(latents=latents, log_probs=first.log_probs.at[4:].set(jnp.nan).at[:2].set(jnp.nan))
    assert_trees_close(gradients_of(config, spoiled)[0], gradients, rtol=0)
    moved = first._replace(latents=first.latents.at[3].add(0.1))
    assert optax.global_norm(optax.tree.sub(gradients_of(config, moved)[0], gradients)) > 1e-4


@pytest.mark.parametrize("size", (1, 2))
def test_what_a_group_shares_is_computed_once(size):
    config = dataclasses.replace(BASE, window=(size, (0, 4)), kl_beta=0.5, clip_range=0.1)
    noise, inputs = (jax.tree.map(lambda x: jnp.repeat(x[:2], 4, axis=0), tree) for tree in (NOISE, INPUTS))
    batches = []

    def counting(params, lora, latents, *rest):
        batches.append(latents.shape[0])
        return network(params, lora, latents, *rest)

    lora, starts = perturb(LORA), set()
    plain, shared = make_rollout(network, config), make_rollout(counting, config, shared_groups=2)
    for seed in range(8):
        arguments = (PARAMS, lora, inputs, noise, jax.random.key(seed), SIGMAS)
        want, got = plain(*arguments), shared(*arguments)
        assert_trees_close(got, want, rtol=1e-5, atol=1e-6)
        starts.add(int(got.steps[0]))
    assert len(starts) >= 3 and np.abs(got.latents[-1, 0] - got.latents[-1, 1]).max() > 1e-3
    # Behind the window every sample is computed; before it and at its first step one of each group.
    assert sorted(batches) == ([2, 2, 8] if size == 1 else [2, 2, 8, 8])

    if size == 1:
        optimizer = optax.sgd(0.1)
        updates = [make_update(policy, optimizer, config) for policy in (network, once_per_group(counting, 2))]
        batches.clear()
        states, metrics = zip(*(u(PARAMS, init_state(lora, optimizer), None, got, ADVANTAGES, inputs) for u in updates))
        assert_trees_close(states[0], states[1], rtol=1e-5, atol=1e-6)
        assert_trees_close(metrics[0], metrics[1], rtol=1e-4, atol=1e-5)
        assert set(batches) == {2} and metrics[1]["gradient_norm"] > 0


def test_groups_must_be_equal():
    with pytest.raises(ValueError, match="8 samples cannot be 3 groups"):
        once_per_group(network, 3)(PARAMS, LORA, NOISE, SIGMAS[0], INPUTS)


def test_windows_cover_their_range():
    config = dataclasses.replace(BASE, window=(2, (1, 5)))
    starts = [int(draw_window(jax.random.key(i), config)) for i in range(60)]
    assert set(starts) == {1, 2, 3}
    assert int(draw_window(KEY, BASE)) == 0
    used = {int(sample(config, key=jax.random.key(i)).steps[0]) for i in range(12)}
    assert used == {1, 2, 3}


@pytest.mark.parametrize("batch_branches", (False, True))
def test_guidance_is_part_of_the_policy_but_for_the_window(batch_branches):
    inputs = {"cond": INPUTS, "uncond": make_inputs(BATCH, seed=7)}
    x, lora = NOISE, perturb(LORA)
    cond, uncond = (network(PARAMS, lora, x, 0.5, inputs[name]) for name in ("cond", "uncond"))
    config = dataclasses.replace(BASE, guidance_scale=3.5)
    for policy in guided_policies(network, config, batch_branches):
        got = policy(PARAMS, lora, x, jnp.float32(0.5), inputs)
        np.testing.assert_allclose(got, uncond + 3.5 * (cond - uncond), rtol=2e-5, atol=1e-5)
    config = dataclasses.replace(config, window=(2, (0, 4)), cfg_in_window=False)
    inside, outside = guided_policies(network, config, batch_branches)
    np.testing.assert_allclose(inside(PARAMS, lora, x, 0.5, inputs), cond, rtol=1e-6)
    assert np.abs(outside(PARAMS, lora, x, 0.5, inputs) - cond).max() > 0.1

    trajectory = make_rollout(inside, config, outside)(PARAMS, lora, inputs, NOISE, KEY, SIGMAS)
    update = make_update(inside, optax.sgd(0.1), config)
    _, metrics = update(PARAMS, init_state(lora, optax.sgd(0.1)), None, trajectory, ADVANTAGES, inputs)
    assert metrics["log_prob_difference_max"] <= 1e-6
    start = int(trajectory.steps[0])
    guided = lambda x, sigma: outside(PARAMS, lora, x, sigma, inputs)
    end = sample_ode(guided, trajectory.latents[start + 2], SIGMAS[start + 2 :])
    np.testing.assert_allclose(trajectory.latents[-1], end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_branches", (False, True))
def test_stop_gradient_of_the_unconditional_branch(batch_branches):
    inputs = {"cond": INPUTS, "uncond": make_inputs(BATCH, seed=7)}
    lora = perturb(LORA)

    def gradient(stop):
        config = dataclasses.replace(BASE, guidance_scale=3.0, stop_gradient_uncond=stop)
        policy, _ = guided_policies(network, config, batch_branches)
        return jax.grad(lambda l: policy(PARAMS, l, NOISE, jnp.float32(0.5), inputs).sum())(lora)

    # v = v_u + 3 (v_c - v_u): the bias is in both branches, so 1 without the stop and 3 with it.
    np.testing.assert_allclose(gradient(False)["bias"], BATCH, rtol=1e-5)
    np.testing.assert_allclose(gradient(True)["bias"], 3 * BATCH, rtol=1e-5)


def test_updates_split_the_rollout():
    config = dataclasses.replace(BASE, updates_per_rollout=2, clip_range=0.1, ema_decay=0.5)
    trajectory = sample(config)
    optimizer = optax.sgd(0.1)
    state, metrics = make_update(network, optimizer, config)(
        PARAMS, init_state(LORA, optimizer), None, trajectory, ADVANTAGES, INPUTS
    )
    assert int(state.step) == 2
    # By hand: even samples, one step; then odd samples from there.
    lora, ema = LORA, LORA
    for index in range(2):
        part = trajectory._replace(latents=trajectory.latents[:, index::2], log_probs=trajectory.log_probs[:, index::2])
        loss_fn = make_loss(network, PARAMS, None, SIGMAS[1], config)
        inputs = {"context": INPUTS["context"][index::2]}
        gradients, _ = accumulate_gradients(loss_fn, lora, part, ADVANTAGES[index::2], inputs)
        lora = jax.tree.map(lambda p, g: p - 0.1 * g, lora, gradients)
        decay = min(0.5, (1 + index) / (10 + index))
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, ema, lora)
    assert_trees_close(state.lora, lora, rtol=1e-4, atol=1e-6)
    assert_trees_close(state.ema, ema, rtol=1e-4, atol=1e-6)
    assert metrics["log_prob_difference_max"] <= 1e-6 < abs(metrics["ratio_max"] - 1)
    assert metrics["ratio_min"] <= metrics["ratio_mean"] <= metrics["ratio_max"]
    with pytest.raises(ValueError, match="8 samples cannot be split into updates_per_rollout=3"):
        make_update(network, optimizer, dataclasses.replace(config, updates_per_rollout=3))(
            PARAMS, init_state(LORA, optimizer), None, trajectory, ADVANTAGES, INPUTS
        )


@pytest.mark.parametrize(
    "change",
    (
        {},
        {"guard": True},
        {"trust": "dppo", "trust_tau": 1e-3},
        {"sde": SDEConfig("cps", 0.5), "kl_on": "velocity"},
        {"window": (2, (0, 4)), "updates_per_rollout": 4, "micro_batch": 1},
        {"updates_per_rollout": 1},
    ),
    ids=("flow_grpo", "guard", "dppo", "cps", "window", "one-update"),
)
def test_the_trainers_old_policy_is_the_samplers_up_to_rounding(change):
    fields = {"updates_per_rollout": 2, "micro_batch": 2, "kl_beta": 0.1, "clip_range": 0.2, **change}
    config, optimizer, lora = dataclasses.replace(BASE, **fields), optax.sgd(0.5), perturb(LORA)
    states, metrics = {}, {}
    for whose in OLD_LOG_PROBS:
        own = dataclasses.replace(config, old_log_probs=whose)
        trajectory = sample(own, lora)
        assert (trajectory.means is not None) == (config.compares_means and whose == "sampler")
        update = make_update(network, optimizer, own)
        states[whose], metrics[whose] = update(
            PARAMS, init_state(lora, optimizer), None, trajectory, ADVANTAGES, INPUTS
        )
    assert_trees_close(states["trainer"], states["sampler"], rtol=1e-4, atol=1e-5)
    assert_trees_close(metrics["trainer"], metrics["sampler"], rtol=1e-3, atol=1e-5)
    # The policy has moved between the steps, so that it matters which sample is compared with which, and with which policy.
    moved = max(abs(metrics["trainer"][name] - 1) for name in ("ratio_min", "ratio_max"))
    assert moved > 1e-3 if config.updates_per_rollout > 1 else moved == 0
    assert metrics["trainer"]["log_prob_difference_max"] <= 1e-5


def test_samples_without_advantage_can_be_left_out():
    config = dataclasses.replace(BASE, kl_beta=0.5, micro_batch=2, skip_zero_advantage=True)
    lora, optimizer = perturb(LORA), optax.sgd(1.0)
    trajectory, start = sample(config, lora), init_state(lora, optimizer)
    advantages = ADVANTAGES.at[jnp.array([0, 5, 6])].set(0.0)
    update = make_update(network, optimizer, config)
    state, metrics = update(PARAMS, start, None, trajectory, advantages, INPUTS)
    kept = np.flatnonzero(advantages)
    assert len(kept) == 4
    others = trajectory._replace(latents=trajectory.latents[:, kept], log_probs=trajectory.log_probs[:, kept])
    loss_fn = make_loss(network, PARAMS, None, SIGMAS[1], config)
    inputs = {"context": INPUTS["context"][kept]}
    gradients, alone = accumulate_gradients(loss_fn, lora, others, advantages[kept], inputs)
    assert_trees_close(state.lora, jax.tree.map(jnp.subtract, lora, gradients), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], alone["loss"].mean(), rtol=1e-4)
    # They are kept by default, where their KL counts.
    plain = make_update(network, optimizer, dataclasses.replace(config, skip_zero_advantage=False))
    with_all, _ = plain(PARAMS, start, None, trajectory, advantages, INPUTS)
    assert optax.global_norm(optax.tree.sub(with_all.lora, state.lora)) > 1e-3
    # An update of which nothing is left is none.
    same, metrics = update(PARAMS, start, None, trajectory, jnp.zeros(BATCH), INPUTS)
    jax.tree.map(np.testing.assert_array_equal, same, start)
    assert metrics["non_finite"] == 0


@pytest.mark.parametrize("options", ({}, {"sorts": False}, {"updates_per_rollout": 2, "old_log_probs": "trainer"}))
def test_no_pass_is_computed_for_micro_batches_without_advantage(options):
    """Counted where the network is called; what is trained is what it was when every micro-batch was computed."""
    calls, fields = [], dict(options)
    sorts = fields.pop("sorts", True)

    def counted(params, lora, x, sigma, inputs):
        jax.debug.callback(lambda: calls.append(1))
        return network(params, lora, x, sigma, inputs)

    config = dataclasses.replace(BASE, kl_beta=0.5, micro_batch=1, skip_zero_advantage=True, **fields)
    lora, optimizer = perturb(LORA), optax.sgd(1.0)
    trajectory, start = sample(config, lora), init_state(lora, optimizer)
    advantages = ADVANTAGES.at[jnp.array([0, 2, 3, 5, 6])].set(0.0)
    update = make_update(counted, optimizer, config, sorts=sorts)
    state, metrics = update(PARAMS, start, None, trajectory, advantages, INPUTS)
    jax.block_until_ready(state)
    jax.effects_barrier()
    some, everything = len(calls), jnp.where(advantages == 0, 1e-30, advantages)
    calls.clear()
    jax.block_until_ready(update(PARAMS, start, None, trajectory, everything, INPUTS))
    jax.effects_barrier()
    kept = int(jnp.sum(advantages != 0))
    extra = 0 if sorts else int(advantages[0] == 0)  # the first is always computed
    assert metrics["computed"] == pytest.approx((kept + extra) / BATCH)
    # Reference and policy, and the old policy of the second update's samples.
    updates = config.updates_per_rollout
    passes = [[2 + (number > 0)] * int(jnp.sum(advantages[number::updates] != 0)) for number in range(updates)]
    assert some == sum(sum(part) for part in passes) * config.trained_steps + 2 * extra * config.trained_steps
    assert len(calls) == sum((2 + (number > 0)) * BATCH // updates for number in range(updates)) * config.trained_steps
    alone = dataclasses.replace(config, micro_batch=None)
    want, _ = make_update(network, optimizer, alone)(PARAMS, start, None, trajectory, advantages, INPUTS)
    assert_trees_close(state.lora, want.lora, rtol=1e-4, atol=1e-6)


def test_programs_of_log_probabilities_round_where_they_say_so():
    # In float32 the product is 1 + 2^-12, in bfloat16 it is 1.
    left, right = jnp.array([[1, 2**-6]], jnp.bfloat16), jnp.array([[1], [2**-6]], jnp.bfloat16)
    product = lambda a, b: (a @ b).astype(jnp.float32)
    assert jax.jit(product)(left, right) == 1 + 2**-12  # what is to be avoided
    exact = jit_exactly(product)
    ahead = exact.trace(left, right).lower().compile()
    other = jit_exactly(product, compiler_options={"xla_backend_optimization_level": 3})
    assert exact(left, right) == ahead(left, right) == other.lower(left, right).compile()(left, right) == 1


@pytest.mark.parametrize("where", ("advantage", "latents"))
def test_non_finite_is_reported_and_the_state_survives(where):
    trajectory, advantages = sample(BASE), ADVANTAGES
    if where == "advantage":
        advantages = advantages.at[3].set(jnp.nan)
    else:
        trajectory = trajectory._replace(latents=trajectory.latents.at[2, 1].set(jnp.inf))
    optimizer = optax.adam(0.1)
    state = init_state(LORA, optimizer)
    new, metrics = make_update(network, optimizer, BASE)(PARAMS, state, None, trajectory, advantages, INPUTS)
    assert metrics["non_finite"] == 1 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, new, state)
    _, metrics = make_update(network, optimizer, BASE)(PARAMS, state, None, sample(BASE), ADVANTAGES, INPUTS)
    assert metrics["non_finite"] == 0


@pytest.mark.parametrize(
    "change",
    (
        {},
        {"sde": SDEConfig("cps", 0.5), "kl_on": "velocity"},
        {"window": (2, (0, 4))},
        {"guard": True},
        {"trust": "dppo", "trust_tau": 1e-2, "updates_per_rollout": 2},
        {"updates_per_rollout": 2, "micro_batch": 16, "global_std": True},
    ),
    ids=("flow_grpo", "cps", "window", "guard", "dppo", "two-updates"),
)
def test_toy_policy_learns(change):
    """32 prompts x 8 samples of a 2-D latent; the reward is the closeness to a point the base model misses."""
    config = dataclasses.replace(BASE, **{"group_size": 8, "kl_beta": 0.001, "clip_range": 0.2, **change})
    prompts, target = 32, jnp.array([1.0, -0.5])
    inputs = {"context": jnp.repeat(make_inputs(prompts)["context"], config.group_size, axis=0)}
    optimizer = optax.adam(0.03)
    state = init_state(LORA, optimizer)
    sampler, update = make_rollout(network, config), make_update(network, optimizer, config)
    noise_shape, rewards = (prompts * config.group_size, DIM), []
    for step in range(40):
        noise_key, key = jax.random.split(jax.random.fold_in(KEY, step))
        noise = jax.random.normal(noise_key, noise_shape)
        trajectory = sampler(PARAMS, state.lora, inputs, noise, key, SIGMAS)
        reward = -np.linalg.norm(np.asarray(trajectory.latents[-1] - target), axis=-1)
        rewards.append(reward.mean())
        advantages, _ = group_advantages(reward.reshape(prompts, -1), global_std=config.global_std)
        state, metrics = update(PARAMS, state, None, trajectory, jnp.asarray(advantages.reshape(-1)), inputs)
        assert metrics["non_finite"] == 0 and metrics["log_prob_difference_max"] < 1e-5
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.3, rewards
    assert metrics["kl"] > 0


DEVICES = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
sys.path.insert(0, sys.argv[1])
import test_rl_update as t
from unipic2_jax.parallel.mesh import make_mesh, replicated, shard_batch

config = t.dataclasses.replace(t.BASE, updates_per_rollout=2, micro_batch=8, window=(3, (0, 5)), clip_range=0.1)
batch, optimizer = 32, t.optax.adam(0.01)
result = {"devices": jax.device_count()}
for name, devices in (("one", jax.devices()[:1]), ("all", jax.devices())):
    mesh = make_mesh(devices)
    inputs = shard_batch(t.make_inputs(batch), mesh)
    noise = shard_batch(jax.random.normal(t.KEY, (batch, t.DIM)), mesh)
    params, lora = jax.device_put((t.PARAMS, t.perturb(t.LORA)), replicated(mesh))
    with jax.set_mesh(mesh):
        state = jax.device_put(t.init_state(lora, optimizer), replicated(mesh))
        key, sigmas = jax.device_put((t.KEY, t.SIGMAS), replicated(mesh))
        trajectory = t.make_rollout(t.network, config)(params, lora, inputs, noise, key, sigmas)
        advantages = shard_batch(np.linspace(-2, 2, batch, dtype=np.float32), mesh)
        update = t.make_update(t.network, optimizer, config)
        losses = []
        for _ in range(3):
            state, metrics = update(params, state, None, trajectory, advantages, inputs)
            losses.append([float(metrics[k]) for k in ("loss", "kl", "ratio_max", "gradient_norm")])
    result[name] = {
        "losses": losses,
        "spread": len(trajectory.latents.sharding.device_set),
        "latents": np.asarray(trajectory.latents).ravel().tolist(),
        "lora": np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.lora)]).tolist(),
    }
print(json.dumps(result))
"""


def test_eight_devices_equal_one():
    command = [sys.executable, "-c", DEVICES, str(Path(__file__).parent)]
    done = subprocess.run(command, env=eight_devices.ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8 and result["all"]["spread"] == 8 and result["one"]["spread"] == 1
    for name in ("losses", "latents", "lora"):
        np.testing.assert_allclose(result["all"][name], result["one"][name], rtol=1e-4, atol=1e-6)
