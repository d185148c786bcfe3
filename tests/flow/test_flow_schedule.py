"""Schedule, path, timestep sampling, guidance and the ODE sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.flow import guidance, path, schedule, timesteps
from unipic2_jax.flow.ode import sample_ode

SHIFTS = (1.0, 3.0, 5.0)


def diffusers_scheduler(shift, **fields):
    pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **fields)


@pytest.mark.parametrize("shift", (*SHIFTS, 1.5))
def test_sigmas_equal_diffusers_bit_for_bit(shift):
    for steps in (1, 2, 3, 8, 10, 28, 40, 50, 333):
        scheduler = diffusers_scheduler(shift)
        scheduler.set_timesteps(steps)
        ours = np.asarray(schedule.sigmas(steps, shift))
        assert ours.dtype == np.float32 and ours.shape == (steps + 1,)
        np.testing.assert_array_equal(ours, scheduler.sigmas.numpy())


def test_sigmas_without_diffusers():
    values = np.asarray(schedule.sigmas(10, 3.0))
    assert values[0] == 1.0 and values[-1] == 0.0 and (np.diff(values) < 0).all()
    # The last level is the smallest training level, shifted once for the table and once for the sampler.
    np.testing.assert_allclose(values[-2], 0.0089287, rtol=1e-4)


def test_scheduler_config_round_trip(tmp_path):
    scheduler = diffusers_scheduler(3.0)
    scheduler.save_pretrained(tmp_path)
    config = schedule.FlowMatchConfig.load(tmp_path)
    assert config == schedule.FlowMatchConfig(num_train_timesteps=1000, shift=3.0)
    config.save(tmp_path / "ours")
    again = type(scheduler).from_pretrained(tmp_path / "ours")
    again.set_timesteps(10)
    np.testing.assert_array_equal(np.asarray(config.sigmas(10)), again.sigmas.numpy())


@pytest.mark.parametrize(
    "field",
    [
        {"use_dynamic_shifting": True},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"shift": 0.0},
        {"_class_name": "DPMSolverMultistepScheduler"},
    ],
)
def test_scheduler_config_refuses_what_it_cannot_do(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        schedule.FlowMatchConfig.from_dict(field)


def test_scheduler_config_names_the_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*scheduler_config\.json"):
        schedule.FlowMatchConfig.load(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        schedule.FlowMatchConfig.load(tmp_path)
    with pytest.raises(ValueError, match="at least 1 step"):
        schedule.sigmas(0)


def test_path_and_its_inverse():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 5))
    sigma = jnp.array([0.0, 0.3, 1.0])
    x = path.interpolate(x0, noise, sigma)
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_array_equal(x[2], noise[2])
    velocity = path.target_velocity(x0, noise)
    np.testing.assert_allclose(path.predict_x0(x, velocity, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(path.predict_noise(x, velocity, sigma), noise, atol=1e-6)
    slope = jax.jvp(lambda s: path.interpolate(x0, noise, s), (sigma,), (jnp.ones(3),))[1]
    np.testing.assert_allclose(slope, velocity, atol=1e-6)
    assert path.interpolate(x0.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), 0.5).dtype == jnp.float32


def test_uniform_sampling_with_shift():
    config = timesteps.TimestepSampling("uniform", shift=3.0)
    sigma = np.asarray(timesteps.sample_sigmas(jax.random.key(0), 20000, config))
    assert sigma.min() > 0 and sigma.max() < 1
    # Undoing the shift leaves a uniform distribution.
    undone = np.sort(sigma / (3.0 - 2.0 * sigma))
    assert np.abs(undone - (np.arange(20000) + 0.5) / 20000).max() < 0.02


def test_logit_normal_sampling_has_the_asked_mean_and_std():
    config = timesteps.TimestepSampling("logit_normal", mean=0.5, std=0.8)
    sigma = np.asarray(timesteps.sample_sigmas(jax.random.key(1), 20000, config), np.float64)
    logits = np.log(sigma / (1 - sigma))
    assert abs(logits.mean() - 0.5) < 0.03 and abs(logits.std() - 0.8) < 0.03


def test_levels_with_the_schedulers_shift_are_those_of_diffusers_training_script():
    levels = lambda shift: np.asarray(
        timesteps.sample_sigmas(jax.random.key(0), 40000, timesteps.TimestepSampling(mean=0.3, shift=shift))
    )
    u = jax.nn.sigmoid(-0.3 + jax.random.normal(jax.random.key(1), (40000,)))  # the script's logit_mean
    scheduler = diffusers_scheduler(3.0)
    theirs = scheduler.timesteps.numpy()[np.asarray(u * 1000, np.int32)] / 1000
    parts = np.arange(5, 100, 5)
    np.testing.assert_allclose(*(np.percentile(drawn, parts) for drawn in (levels(3.0), theirs)), atol=0.01)
    assert np.abs(np.percentile(levels(1.0), parts) - np.percentile(theirs, parts)).max() > 0.2


def test_levels_of_full_size_are_high():
    sigma = np.asarray(timesteps.sample_sigmas(jax.random.key(0), 40000, timesteps.TimestepSampling(shift=3.0)))
    # logit(sigma) is normal around log(3): half lie above 0.75, and 0.8 is log(4/3) standard deviations higher.
    assert np.median(sigma) == pytest.approx(0.75, abs=0.005) and np.mean(sigma > 0.8) == pytest.approx(0.387, abs=0.01)


def test_sampling_refuses_nonsense():
    for fields, word in (({"kind": "cosine"}, "cosine"), ({"std": 0.0}, "std"), ({"shift": -1.0}, "shift")):
        with pytest.raises(ValueError, match=word):
            timesteps.TimestepSampling(**fields)


def test_loss_weights_equal_diffusers():
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    theirs = pytest.importorskip("diffusers.training_utils").compute_loss_weighting_for_sd3
    sigma = np.linspace(0.01, 0.99, 50, dtype=np.float32)
    for name in ("none", "sigma_sqrt", "cosmap"):
        expected = theirs(name, torch.from_numpy(sigma)).numpy()
        np.testing.assert_allclose(timesteps.loss_weight(jnp.asarray(sigma), name), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="cubic"):
        timesteps.loss_weight(jnp.asarray(sigma), "cubic")


def test_sigma_squared_is_the_error_of_the_clean_image():
    keys = jax.random.split(jax.random.key(2), 4)
    x0, noise, velocity = (jax.random.normal(k, (6, 4, 4, 2)) for k in keys[:3])
    sigma = jax.random.uniform(keys[3], (6,))
    implied = path.predict_x0(path.interpolate(x0, noise, sigma), velocity, sigma)
    np.testing.assert_allclose(
        timesteps.velocity_loss(velocity, x0, noise, sigma, "sigma_squared"),
        jnp.mean((implied - x0) ** 2, axis=(1, 2, 3)),
        rtol=1e-4,
    )
    plain = timesteps.velocity_loss(velocity, x0, noise, sigma)
    np.testing.assert_allclose(plain, jnp.mean((velocity - (noise - x0)) ** 2, axis=(1, 2, 3)), rtol=1e-5)


def test_guidance_convention_and_both_evaluations():
    latents = jax.random.normal(jax.random.key(3), (2, 3, 3, 1))
    cond = lambda x, sigma: 2.0 * x + path.expand(sigma, x)
    uncond = lambda x, sigma: -x
    expected = uncond(latents, 0.5) + 3.5 * (cond(latents, 0.5) - uncond(latents, 0.5))
    np.testing.assert_allclose(guidance.guided_velocity(cond, uncond, 3.5)(latents, 0.5), expected, rtol=1e-6)

    def batched(x, sigma):
        first, second = jnp.split(x, 2)
        low, high = jnp.split(sigma, 2) if jnp.ndim(sigma) else (sigma, sigma)
        return jnp.concatenate([uncond(first, low), cond(second, high)])

    for sigma in (jnp.float32(0.5), jnp.full(2, 0.5)):
        got = guidance.guided_velocity_batched(batched, 3.5)(latents, sigma)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    # Scale 1 is the conditional velocity, and needs no other branch.
    np.testing.assert_array_equal(guidance.guided_velocity(cond, None, 1.0)(latents, 0.5), cond(latents, 0.5))
    with pytest.raises(ValueError, match="unconditional"):
        guidance.guided_velocity(cond, None, 2.0)


def test_guidance_stops_only_the_unconditional_gradient():
    latents = jnp.ones((1, 2))

    def gradient(stop):
        def total(weights):
            cond, uncond = (lambda x, sigma, w=w: w * x for w in weights)
            return guidance.guided_velocity(cond, uncond, 3.0, stop)(latents, 0.5).sum()

        return jax.grad(total)(jnp.array([1.0, 1.0]))

    np.testing.assert_allclose(gradient(False), [6.0, -4.0])
    np.testing.assert_allclose(gradient(True), [6.0, 0.0])


@pytest.mark.parametrize("shift", SHIFTS)
def test_ode_equals_diffusers(shift):
    scheduler = diffusers_scheduler(shift)
    torch = pytest.importorskip("torch")
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    scheduler.set_timesteps(10)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) + t / 1000, t, x).prev_sample
    ours = jax.jit(lambda n: sample_ode(lambda x, s: jnp.sin(3 * x) + s, n, schedule.sigmas(10, shift)))(noise)
    error = np.linalg.norm(ours - x.numpy()) / np.linalg.norm(x.numpy())
    assert error <= 1e-4
