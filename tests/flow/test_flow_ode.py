"""The solvers: their order, and the second-order one against its formula and against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.flow.ode import correction_weights, sample_ode
from unipic2_jax.flow.schedule import sigmas as make_sigmas

MEAN, STD = 1.5, 0.4


def velocity(x, sigma):
    """Of data N(MEAN, STD^2): the mean of noise - x0 given x."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    slope = (sigma - (1 - sigma) * STD**2) / variance
    return slope * (x - (1 - sigma) * MEAN) - MEAN


def solution(x, sigma, sigma_next):
    """Where the flow of `velocity` takes x."""
    std = lambda s: np.sqrt((1 - s) ** 2 * STD**2 + s**2)
    return (1 - sigma_next) * MEAN + (x - (1 - sigma) * MEAN) * std(sigma_next) / std(sigma)


def error(solver, sigmas):
    start = np.linspace(-2, 2, 7, dtype=np.float32)[:, None]
    got = jax.jit(sample_ode, static_argnames=("velocity_fn", "solver"))(velocity, start, sigmas, solver=solver)
    return np.abs(got - solution(start, sigmas[0], sigmas[-1])).max()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm2", 2)])
def test_the_error_falls_with_the_order(solver, order):
    errors = [error(solver, np.linspace(0.9, 0.3, steps + 1, dtype=np.float32)) for steps in (16, 32, 64)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (np.abs(orders - order) < 0.1).all(), (errors, orders)


def curved(x, sigma):
    return jnp.sin(3 * x) + x * sigma


def multistep(x, sigmas):
    """DPM-Solver++ 2M in alpha and lambda as DiffusionNFT's solver.py has it, float64."""
    alpha, sigmas = 1 - np.asarray(sigmas, np.float64), np.asarray(sigmas, np.float64)
    with np.errstate(divide="ignore"):
        level = np.log(alpha) - np.log(sigmas)
    before, total = None, len(sigmas) - 1
    for i in range(total):
        x0 = x - sigmas[i] * (np.sin(3 * x) + x * sigmas[i])
        if i in (0, total - 1):  # deterministic DDIM: the predicted image, and the predicted noise at the next level
            x = alpha[i + 1] * x0 + sigmas[i + 1] * (x - alpha[i] * x0) / sigmas[i]
        else:
            h, h_before = level[i + 1] - level[i], level[i] - level[i - 1]
            grown = alpha[i + 1] * (np.exp(-h) - 1)
            x = sigmas[i + 1] / sigmas[i] * x - grown * x0 - 0.5 * grown * (h / h_before) * (x0 - before)
        before = x0
    return x


@pytest.mark.parametrize("steps", (1, 2, 3, 10))
def test_the_second_order_equals_its_formula(steps):
    sigmas = make_sigmas(steps, 3.0)
    noise = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(np.float32)
    got = sample_ode(curved, noise, sigmas, "dpm2")
    np.testing.assert_allclose(got, multistep(noise, sigmas), rtol=2e-5, atol=1e-5)
    weights = correction_weights(sigmas)
    assert weights.shape == (steps,) and np.isfinite(weights).all()
    assert weights[0] == 0 and weights[-1] == 0 and (weights[2:-1] > 0).all()


def test_the_second_order_equals_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(12)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))
    sigmas = scheduler.sigmas.numpy().copy()
    got = sample_ode(curved, x.numpy(), sigmas, "dpm2")
    for step, time in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.sin(3 * x) + x * float(sigmas[step]), time, x).prev_sample
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-4, atol=1e-5)


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="'heun' is unknown; choose one of euler, dpm2"):
        sample_ode(curved, jnp.zeros((1, 2)), make_sigmas(3), "heun")
