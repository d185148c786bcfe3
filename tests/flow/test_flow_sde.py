"""The stochastic samplers: formulas, probabilities, and the distribution they leave."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.flow.ode import sample_ode
from unipic2_jax.flow.schedule import sigmas as make_sigmas
from unipic2_jax.flow.sde import SDEConfig, log_prob, sde_step, sde_step_mean_std

CONFIGS = (SDEConfig("flow_grpo", 0.7), SDEConfig("cps", 0.7))
MEAN, STD = 1.5, 0.6  # of the toy's images


def gaussian_velocity(x, sigma):
    """E[noise - x0 | x] for x0 ~ N(MEAN, STD^2): the best velocity in closed form."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return (sigma - (1 - sigma) * STD**2) / variance * (x - (1 - sigma) * MEAN) - MEAN


def sample_sde(key, sigmas, config, count):
    """Runs the SDE over [1, count] independent scalars; returns the latents after every step."""

    def step(x, scanned):
        key, sigma, sigma_next = scanned
        x = sde_step(key, gaussian_velocity(x, sigma), x, sigma, sigma_next, sigmas[1], config)[0]
        return x, x

    keys = jax.random.split(key, len(sigmas))
    start = jax.random.normal(keys[0], (1, count))
    return jax.lax.scan(step, start, (keys[1:], sigmas[:-1], sigmas[1:]))[1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_the_sde_keeps_the_marginals(config):
    """flow_grpo keeps mean and std at every level; cps keeps the mean (its std is only bounded, see the module)."""
    count, steps = 40000, 400
    sigmas = make_sigmas(steps, 3.0)
    latents = np.asarray(jax.jit(lambda key: sample_sde(key, sigmas, config, count))(jax.random.key(0)))[:, 0]
    for index in (steps // 4, steps // 2, 3 * steps // 4, steps):
        sigma = float(sigmas[index])
        values = latents[index - 1]
        std = math.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)
        # Four standard errors of 40000 samples, and one percent for 400 finite steps.
        assert abs(values.mean() - (1 - sigma) * MEAN) < 4 * std / math.sqrt(count) + 0.01, (index, values.mean())
        if config.kind == "flow_grpo":
            assert abs(values.std() / std - 1) < 4 / math.sqrt(2 * count) + 0.01, (index, values.std(), std)
        else:
            assert 0.75 < values.std() / std < 1.01, (index, values.std(), std)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_the_noise_is_real(config):
    """Without this the test of the marginals would also pass for an ODE."""
    sigmas = make_sigmas(20, 3.0)
    first, second = (sample_sde(jax.random.key(seed), sigmas, config, 4000) for seed in (0, 1))
    assert np.abs(np.corrcoef(first[-1, 0], second[-1, 0])[0, 1]) < 0.1
    noise = jax.random.normal(jax.random.key(0), (1, 4000))
    assert np.corrcoef(sample_ode(gaussian_velocity, noise, sigmas)[0], noise[0])[0, 1] > 0.99


def test_flow_grpo_step_equals_an_independent_derivation():
    """From the SDE of the Flow-GRPO paper: dx = [v + s^2/(2 sigma) (x + (1 - sigma) v)] dt + s dw, in float64."""
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    rng = np.random.default_rng(1)
    sigmas = make_sigmas(10, 3.0)
    for index in (0, 4, 9):
        x, v, x_next = rng.standard_normal((3, 2, 4, 4, 3)).astype(np.float32)
        mean, std = sde_step_mean_std(v, x, sigmas[index], sigmas[index + 1], sigmas[1], CONFIGS[0])
        t, t_next = (torch.tensor(float(sigmas[i]), dtype=torch.float64) for i in (index, index + 1))
        tx, tv, tn = (torch.from_numpy(a).double() for a in (x, v, x_next))
        s = 0.7 * torch.sqrt(t / (1 - (t if t < 1 else torch.tensor(float(sigmas[1])).double())))
        dt = t_next - t
        drift = tv + s**2 / (2 * t) * (tx + (1 - t) * tv)
        normal = torch.distributions.Normal(tx + drift * dt, s * torch.sqrt(-dt))
        np.testing.assert_allclose(mean, normal.mean.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(std, normal.stddev.numpy().max(), rtol=1e-5)
        expected = normal.log_prob(tn).mean(dim=(1, 2, 3)).numpy()
        got = log_prob(jnp.asarray(x_next), mean, std, CONFIGS[0])
        assert got.shape == (2,)
        np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_cps_step_keeps_the_coefficients():
    """The next latents are (1 - sigma') x0 plus noise of total strength sigma', old and fresh together."""
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 5, 5, 2))
    sigma, sigma_next, config = jnp.float32(0.8), jnp.float32(0.5), SDEConfig("cps", 0.4)
    x = (1 - sigma) * x0 + sigma * noise
    mean, std = sde_step_mean_std(noise - x0, x, sigma, sigma_next, jnp.float32(0.9), config)
    kept = (mean - (1 - sigma_next) * x0) / noise
    np.testing.assert_allclose(kept, kept.mean(), rtol=1e-3)
    np.testing.assert_allclose(kept.mean() ** 2 + std**2, sigma_next**2, rtol=1e-4)
    np.testing.assert_allclose(std, 0.5 * math.sin(0.2 * math.pi), rtol=1e-6)
    x_next = mean + 0.3
    np.testing.assert_allclose(log_prob(x_next, mean, std, config), -0.09, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_batched_noise_levels_equal_scalars(config):
    x, velocity = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    sigma, sigma_next = jnp.array([1.0, 0.6, 0.3]), jnp.array([0.9, 0.5, 0.1])
    mean, std = sde_step_mean_std(velocity, x, sigma, sigma_next, 0.9, config)
    together = log_prob(x, mean, std, config)
    for i in range(3):
        one = sde_step_mean_std(velocity[i : i + 1], x[i : i + 1], sigma[i], sigma_next[i], 0.9, config)
        np.testing.assert_allclose(mean[i : i + 1], one[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(together[i], log_prob(x[i : i + 1], *one, config)[0], rtol=1e-5)


def test_step_reports_what_it_did():
    x, velocity = jax.random.normal(jax.random.key(0), (2, 4, 2, 2, 1))
    args = (velocity, x, 0.7, 0.6, 0.9, CONFIGS[0])
    x_next, mean, std, value = sde_step(jax.random.key(1), *args)
    again_mean, again_std = sde_step_mean_std(*args)
    np.testing.assert_array_equal(mean, again_mean)
    np.testing.assert_array_equal(value, log_prob(x_next, again_mean, again_std, CONFIGS[0]))
    assert value.shape == (4,) and std.shape == ()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_every_step_has_a_finite_gradient(config):
    """s = 0 happens only at the last step of cps, which has no probability to scale and stays finite."""
    sigmas = make_sigmas(10, 3.0)
    x = jax.random.normal(jax.random.key(0), (2, 4))

    def total(v, index):
        mean, std = sde_step_mean_std(v, x, sigmas[index], sigmas[index + 1], sigmas[1], config)
        return log_prob(x, mean, std, config).sum()

    for index in range(10):
        gradient = jax.grad(total)(x * 0.3, index)
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, index


def test_config_refuses_a_step_without_noise():
    for fields, word in (
        ({"noise_level": 0.0}, "use the ODE"),
        ({"noise_level": float("nan")}, "above 0"),
        ({"kind": "ddim"}, "ddim"),
        ({"kind": "cps", "noise_level": 1.5}, "at most 1"),
    ):
        with pytest.raises(ValueError, match=word):
            SDEConfig(**fields)
