"""DiffusionNFT: the loss against its reference's numbers and an independent derivation, the old policy, and a policy that learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rl_toy import DIM, make_inputs, make_params, network, perturb

from unipic2_jax.flow.ode import sample_ode
from unipic2_jax.flow.schedule import sigmas as make_sigmas
from unipic2_jax.rl.advantages import group_advantages
from unipic2_jax.rl.nft import (
    Finished,
    NFTConfig,
    init_state,
    make_rollout,
    make_update,
    nft_loss,
    noise_levels,
    old_share,
    optimality,
)

STEPS, BATCH = 6, 8
SIGMAS = make_sigmas(STEPS, 3.0)
BASE = NFTConfig(num_steps=STEPS, group_size=4)
PARAMS, LORA = make_params()
INPUTS = make_inputs(BATCH)
NOISE = jax.random.normal(jax.random.key(3), (BATCH, DIM))
ADVANTAGES = jnp.array([1.0, -1.0, 0.5, 0.0, 2.0, -2.0, -0.3, 0.7])
KEY = jax.random.key(4)


def recorded():
    """x0, x, velocity, old, reference [4, 3, 3, 2], noise levels and advantages [4]."""
    rng = np.random.default_rng(7)
    x0, noise, velocity, old, reference = (rng.standard_normal((4, 3, 3, 2)).astype(np.float32) for _ in range(5))
    sigma = np.array([1.0, 0.8, 0.45, 0.1], np.float32)
    s = sigma[:, None, None, None]
    return x0, (1 - s) * x0 + s * noise, velocity, old, reference, sigma, np.array([2.0, -1.0, 7.0, -0.5], np.float32)


def ours(config):
    """Loss and gradient by the velocity, of the batch's mean, and the policy loss per sample."""
    x0, x, velocity, old, reference, sigma, advantage = recorded()

    def mean(v):
        loss, metrics = nft_loss(v, old, reference, x0, x, sigma, optimality(advantage, config), config)
        return loss.mean(), metrics

    (loss, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(velocity))
    return loss, gradient, metrics


# What lines 870 to 960 of NVlabs/DiffusionNFT's scripts/train_nft_sd3.py (commit 24af555) give for `recorded()`.
REFERENCE = (
    (
        {"beta": 1.0, "kl_beta": 1e-4},
        6.701746457778231,
        [1.8733120887545853, 2.518710311696487, 0.6653735613931699, 0.3038907604640335],
        [0.560941219329834, 0.362152636051178, 0.3098805546760559, 0.05799386277794838],
        [-0.03644612804055214, -0.037550188601017, -0.017159368842840195, -0.004181791562587023],
    ),
    (
        {"beta": 0.1, "kl_beta": 0.05},
        58.17085880743463,
        [17.073650780528745, 19.692188218482915, 7.876387015259268, 1.8392390747084688],
        [0.3411669433116913, 0.12151782959699631, 0.33556145429611206, 0.016630621626973152],
        [0.009100742638111115, -0.004936906509101391, 0.07474532723426819, -0.005545256659388542],
    ),
)


@pytest.mark.parametrize("fields, total, unweighted, norms, firsts", REFERENCE)
def test_loss_and_gradient_are_the_reference_s(fields, total, unweighted, norms, firsts):
    config = dataclasses.replace(BASE, **fields)
    loss, gradient, metrics = ours(config)
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy_loss"] / config.adv_clip_max, unweighted, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(gradient.reshape(4, -1), axis=1), norms, rtol=1e-4)
    np.testing.assert_allclose(gradient.reshape(4, -1)[:, 0], firsts, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"].mean(), 1.3805489540100098, rtol=1e-5)
    np.testing.assert_allclose(metrics["old_difference"].mean(), 1.9376654624938965, rtol=1e-5)


@pytest.mark.parametrize("beta", (1.0, 0.3))
def test_loss_and_gradient_equal_an_independent_derivation(beta):
    """In PyTorch and float64, in the form of the paper: distances of v+- from the path's velocity, which x0+- - x0 is up to sigma."""
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    config = dataclasses.replace(BASE, beta=beta, kl_beta=0.02)
    x0, x, velocity, old, reference, sigma, advantage = (torch.from_numpy(a).double() for a in recorded())
    velocity.requires_grad_(True)
    level = sigma[:, None, None, None]
    target, step = (x - x0) / level, beta * (velocity - old)  # noise - x0

    def distance(v):
        squares, sizes = (v - target) ** 2, (v - target).abs()
        return sigma * squares.flatten(1).mean(1) / sizes.flatten(1).mean(1).detach()

    good = ((advantage.clamp(-5, 5) + 5) / 10).double()
    policy = 5 / beta * (good * distance(old + step) + (1 - good) * distance(old - step))
    total = (policy + 0.02 * ((velocity - reference) ** 2).flatten(1).mean(1)).mean()
    total.backward()
    loss, gradient, metrics = ours(config)
    np.testing.assert_allclose(metrics["policy_loss"], policy.detach(), rtol=1e-4)
    np.testing.assert_allclose(loss, total.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, velocity.grad, rtol=1e-3, atol=1e-6)


def test_a_good_sample_pulls_and_a_bad_one_pushes():
    """Where the policy is its own old one, v+ and v- agree: what is left is 2 r - 1 times the way to the sample."""
    x0, x, _, old, _, sigma, _ = recorded()
    config = dataclasses.replace(BASE, kl_beta=0.0, beta=0.5)

    def pull(advantage):
        r = optimality(jnp.full(4, advantage), config)
        return jax.grad(lambda v: nft_loss(v, old, None, x0, x, sigma, r, config)[0].sum())(jnp.asarray(old))

    good, bad, middling = pull(5.0), pull(-5.0), pull(0.0)
    error = x - sigma[:, None, None, None] * old - x0
    assert (np.sign(good) == -np.sign(error)).all() and np.abs(good).min() > 0
    np.testing.assert_allclose(bad, -good, rtol=1e-5)
    np.testing.assert_allclose(middling, 0, atol=1e-6)
    np.testing.assert_allclose(pull(2.5), 0.5 * good, rtol=1e-4, atol=1e-7)


def test_neither_old_nor_reference_policy_gets_gradient():
    x0, x, velocity, old, reference, sigma, advantage = recorded()
    loss = lambda o, r: nft_loss(velocity, o, r, x0, x, sigma, optimality(advantage, BASE), BASE)[0].sum()
    for gradient in jax.grad(loss, argnums=(0, 1))(old, reference):
        np.testing.assert_array_equal(gradient, 0.0)
    with pytest.raises(ValueError, match="no reference velocity"):
        loss(old, None)


def test_advantages_become_shares():
    r = optimality(jnp.array([-9.0, -5.0, -2.0, 0.0, 1.0, 5.0, 9.0]), BASE)
    np.testing.assert_allclose(r, [0, 0, 0.3, 0.5, 0.6, 1, 1], rtol=1e-6)


def test_the_old_policy_follows_by_the_reference_s_schedules():
    """`return_decay` of the reference, types 0 (none), 1 and 2."""
    shares = lambda numbers, config: [float(old_share(n, config)) for n in numbers]
    np.testing.assert_allclose(shares((0, 1, 7, 400, 900), BASE), [0, 0.001, 0.007, 0.4, 0.5], rtol=1e-5)
    late = dataclasses.replace(BASE, old_flat=75, old_rate=0.0075, old_max=0.999)
    np.testing.assert_allclose(shares((0, 74, 75, 76, 180, 400), late), [0, 0, 0, 0.0075, 0.7875, 0.999], rtol=1e-5)
    assert shares((0, 5, 10**6), dataclasses.replace(BASE, old_max=0.0)) == [0, 0, 0]


def test_each_sample_is_trained_at_noise_levels_of_its_own():
    config = dataclasses.replace(BASE, timestep_fraction=0.99)
    levels = np.asarray(noise_levels(jax.random.split(KEY, 500), SIGMAS, config))
    assert levels.shape == (5, 500) == (config.trained_steps, 500)
    assert all(len(set(column)) == 5 for column in levels.T)
    # Each of the six levels is left out by a sixth of the samples, the last of a sampler (0) is never there.
    counts = {float(level): int((levels == level).sum()) for level in np.unique(levels)}
    assert set(counts) == {float(s) for s in SIGMAS[:-1]} and 380 < min(counts.values()) <= max(counts.values()) < 450
    assert (np.asarray(noise_levels(jax.random.split(KEY, 500)[:7], SIGMAS, config)) == levels[:, :7]).all()


def test_a_rollout_is_the_solver_s():
    for solver in ("euler", "dpm2"):
        config, lora = dataclasses.replace(BASE, solver=solver), perturb(LORA)
        finished = make_rollout(network, config)(PARAMS, lora, INPUTS, NOISE, KEY, SIGMAS)
        velocity = lambda x, sigma, lora=lora: network(PARAMS, lora, x, sigma, INPUTS)
        np.testing.assert_allclose(finished.latents, sample_ode(velocity, NOISE, SIGMAS, solver), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(finished.sigmas, SIGMAS)


FINISHED = Finished(jax.random.normal(jax.random.key(9), (BATCH, DIM)), jnp.asarray(SIGMAS))


@functools.cache
def updater(config, rate=0.1):
    return make_update(network, optax.sgd(rate), config)


def update(config, state=None, advantages=ADVANTAGES, finished=FINISHED, reference=None):
    state = init_state(perturb(LORA), optax.sgd(0.1)) if state is None else state
    return updater(config)(PARAMS, state, reference, finished, advantages, INPUTS, KEY)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_an_update_is_the_formula_and_the_old_policy_follows():
    config = dataclasses.replace(BASE, updates_per_rollout=2, old_rate=0.1, beta=0.7, kl_beta=0.1, ema_decay=0.5)
    start = init_state(perturb(LORA), optax.sgd(0.1))._replace(old=perturb(LORA, seed=5))
    state, metrics = update(config, start)
    keys = jax.random.split(KEY, (2, BATCH))
    levels = noise_levels(keys[1], SIGMAS, config)
    noise = jax.vmap(
        lambda key: jnp.stack([jax.random.normal(jax.random.fold_in(key, k), (DIM,)) for k in range(len(levels))])
    )(keys[0])

    def loss(lora, own):
        losses = []
        for k, sigma in enumerate(levels[:, own]):
            x = (1 - sigma[:, None]) * FINISHED.latents[own] + sigma[:, None] * noise[own, k]
            inputs = {"context": INPUTS["context"][own]}
            v, old, reference = (network(PARAMS, tree, x, sigma, inputs) for tree in (lora, start.old, None))
            given = (FINISHED.latents[own], x, sigma, optimality(ADVANTAGES[own], config), config)
            losses.append(nft_loss(v, old, reference, *given)[0].mean())
        return sum(losses) / len(losses)

    lora, ema = start.lora, start.ema
    for index in range(2):
        gradient = jax.grad(loss)(lora, np.arange(index, BATCH, 2))
        lora = jax.tree.map(lambda p, g: p - 0.1 * g, lora, gradient)
        decay = min(0.5, (1 + index) / (10 + index))
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, ema, lora)
    assert_trees_close(state.lora, lora, rtol=1e-4, atol=1e-5)
    assert_trees_close(state.ema, ema, rtol=1e-4, atol=1e-5)
    # Two optimizer steps were taken: the old policy keeps 0.2 of itself.
    old = jax.tree.map(lambda o, p: 0.2 * o + 0.8 * p, start.old, lora)
    assert_trees_close(state.old, old, rtol=1e-4, atol=1e-5)
    assert int(state.step) == 2 and metrics["old_share"] == pytest.approx(0.2) and metrics["non_finite"] == 0
    assert metrics["old_difference"] > 0 and metrics["kl"] > 0 and metrics["gradient_norm"] > 0


def test_r_may_be_another_function_of_the_advantage():
    side = lambda advantage, config: 0.5 + 0.5 * jnp.sign(advantage)
    other = make_update(network, optax.sgd(0.1), BASE, good_fn=side)
    given = (PARAMS, init_state(perturb(LORA), optax.sgd(0.1)), None, FINISHED)
    state, _ = other(*given, ADVANTAGES, INPUTS, KEY)
    same, _ = updater(BASE)(*given, 5.0 * jnp.sign(ADVANTAGES), INPUTS, KEY)
    assert_trees_close(state, same, rtol=1e-5, atol=1e-7)


def test_micro_batches_change_nothing():
    whole, metrics = update(BASE)
    for size in (4, 1):
        state, other = update(dataclasses.replace(BASE, micro_batch=size))
        assert_trees_close(state, whole, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match="micro_batch 3 does not divide the 8"):
        update(dataclasses.replace(BASE, micro_batch=3))
    with pytest.raises(ValueError, match="8 samples cannot be split into updates_per_rollout=3"):
        update(dataclasses.replace(BASE, updates_per_rollout=3))


@pytest.mark.parametrize("where", ("advantages", "latents"))
def test_non_finite_is_reported_and_the_state_survives(where):
    given = {"advantages": ADVANTAGES.at[3].set(jnp.nan)}
    if where == "latents":
        given = {"finished": FINISHED._replace(latents=FINISHED.latents.at[2].set(jnp.inf))}
    start = init_state(perturb(LORA), optax.sgd(0.1))._replace(old=LORA)
    state, metrics = update(BASE, start, **given)
    assert metrics["non_finite"] == 1 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state, start)


@pytest.mark.parametrize(
    "change",
    ({}, {"beta": 0.1, "updates_per_rollout": 2, "micro_batch": 64}, {"old_max": 0.0, "kl_beta": 0.0}),
    ids=("defaults", "two-updates", "on-policy"),
)
def test_toy_policy_learns(change):
    """32 prompts x 8 samples of a 2-D latent; the reward is the closeness to a point the base model misses."""
    config = dataclasses.replace(BASE, **{"group_size": 8, "solver": "euler", **change})
    prompts, target = 32, jnp.array([1.0, -0.5])
    inputs = {"context": jnp.repeat(make_inputs(prompts)["context"], config.group_size, axis=0)}
    optimizer = optax.adam(0.03)
    state = init_state(LORA, optimizer)
    sampler, step_fn = make_rollout(network, config), make_update(network, optimizer, config)
    rewards = []
    for step in range(40):
        noise_key, key = jax.random.split(jax.random.fold_in(KEY, step))
        noise = jax.random.normal(noise_key, (prompts * config.group_size, DIM))
        finished = sampler(PARAMS, state.old, inputs, noise, key, SIGMAS)
        reward = -np.linalg.norm(np.asarray(finished.latents - target), axis=-1)
        rewards.append(reward.mean())
        advantages, _ = group_advantages(reward.reshape(prompts, -1), global_std=config.global_std)
        state, metrics = step_fn(PARAMS, state, None, finished, jnp.asarray(advantages.reshape(-1)), inputs, key)
        assert metrics["non_finite"] == 0
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.3, rewards


def test_config_refuses_what_cannot_work():
    for fields, words in (
        ({"guidance_scale": 3.5}, "without guidance"),
        ({"solver": "heun"}, "choose one of euler, dpm2, unipc"),
        ({"beta": 0.0}, "beta is 0"),
        ({"old_max": 1.0}, r"old_max is 1\.0"),
        ({"old_rate": -1.0}, "old_rate"),
        ({"num_steps": 1}, "trains none"),
        ({"group_size": 1}, "at least 2"),
        ({"weights": (("a", 1.0), ("a", 2.0))}, "twice"),
    ):
        with pytest.raises(ValueError, match=f"NFT: .*{words}"):
            NFTConfig(**fields)
