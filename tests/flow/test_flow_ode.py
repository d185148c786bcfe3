"""The solvers: their order, and those of second order against a formula and against diffusers; where guidance is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.flow import ode
from unipic2_jax.flow.guidance import check_interval, guided_spans
from unipic2_jax.flow.ode import correction_weights, sample_ode
from unipic2_jax.flow.schedule import FlowMatchConfig
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


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpm2", 2), ("unipc", 2)])
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


SCHEDULERS = {"dpm2": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}


@pytest.mark.parametrize("shift", (1.0, 3.0))
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_solvers_of_second_order_equal_diffusers(solver, shift):
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    scheduler = getattr(diffusers, SCHEDULERS[solver])(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    rng = np.random.default_rng(0)
    weights, start = rng.standard_normal((3, 3)).astype(np.float32), rng.standard_normal((4, 3)).astype(np.float32)
    network = lambda x, sigma: jnp.tanh(x @ weights) + x * sigma
    # Ours as pipelines use it: one program for all numbers of steps.
    program = jax.jit(lambda x, steps, last: ode.advance(network, ode.start(x, solver), steps, 0, last, solver)[0])
    for count in (1, 2, 3, 10, 28):
        scheduler.set_timesteps(count)
        sigmas = FlowMatchConfig(shift=shift).sigmas(count, solver)
        np.testing.assert_array_equal(sigmas, scheduler.sigmas.numpy())
        x = torch.from_numpy(start)
        for sigma, time in zip(sigmas.tolist(), scheduler.timesteps):
            # At the noise level itself; the scheduler's timesteps are cut to whole numbers.
            x = scheduler.step(torch.tanh(x @ torch.from_numpy(weights)) + x * sigma, time, x).prev_sample
        got = program(start, ode.make_steps(sigmas, solver, 32), count)
        np.testing.assert_allclose(got, x.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(sample_ode(network, start, jnp.asarray(sigmas), solver), got, rtol=2e-5, atol=2e-6)
    assert program._cache_size() == 1


@pytest.mark.parametrize("solver", ode.SOLVERS)
def test_a_sampler_in_pieces_and_with_room_to_spare_is_the_same(solver):
    sigmas = FlowMatchConfig().sigmas(7, solver)
    start = np.random.default_rng(1).standard_normal((5, 2)).astype(np.float32)
    whole = sample_ode(curved, start, sigmas, solver)
    program = jax.jit(lambda state, steps, first, last: ode.advance(curved, state, steps, first, last, solver))
    state, steps = ode.start(jnp.asarray(start), solver), ode.make_steps(sigmas, solver, 16)
    for first, last in ((0, 1), (1, 5), (5, 7)):
        state = program(state, steps, first, last)
    np.testing.assert_array_equal(state[0], whole)


def test_from_sigma_one_no_number_is_infinite():
    for count in (1, 2, 3, 9):
        for steps in (
            ode.make_steps(make_sigmas(count), "unipc"),
            ode.make_steps(jnp.asarray(make_sigmas(count)), "unipc"),
        ):
            assert all(np.isfinite(x).all() and len(x) == count for x in steps)


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="'heun' is unknown; choose one of euler, dpm2, unipc"):
        sample_ode(curved, jnp.zeros((1, 2)), make_sigmas(3), "heun")
    with pytest.raises(ValueError, match="'heun' has no noise levels"):
        FlowMatchConfig().sigmas(3, "heun")


def test_guidance_is_cut_where_an_interval_begins_and_ends():
    sigmas = np.asarray([1.0, 0.9, 0.7, 0.4, 0.2, 0.0])
    assert guided_spans(sigmas) == guided_spans(sigmas, (0.0, 1.0)) == [(0, 5, True)]
    assert guided_spans(sigmas, (0.4, 0.9)) == [(0, 1, False), (1, 4, True), (4, 5, False)]
    assert guided_spans(sigmas, (0.95, 1.0)) == [(0, 1, True), (1, 5, False)]
    assert guided_spans(sigmas, (0.5, 0.6)) == [(0, 5, False)]
    for interval in ((0.1,), (0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), "01", (True, 1)):
        with pytest.raises(ValueError, match="give two noise levels"):
            check_interval(interval, 3.5)
    with pytest.raises(ValueError, match="changes nothing at guidance_scale 1"):
        check_interval((0.1, 0.9), 1.0)
    check_interval(None, 1.0)
