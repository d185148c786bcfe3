"""The objective's formulas, and what other implementations got wrong in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.flow.schedule import sigmas as make_sigmas
from unipic2_jax.flow.sde import SDEConfig, log_prob, sde_step_mean_std
from unipic2_jax.rl.config import GRPOConfig
from unipic2_jax.rl.objective import grpo_loss

SIGMAS = make_sigmas(10, 3.0)
INDEX = 4
LEVELS = (SIGMAS[INDEX], SIGMAS[INDEX + 1], SIGMAS[1])


def draw(seed, batch=4):
    return jax.random.normal(jax.random.key(seed), (batch, 3, 3, 2))


def old_policy(velocity, x, seed, config):
    """What a rollout would have recorded: the next latents, their log-probability and mean."""
    mean, std = sde_step_mean_std(velocity, x, *LEVELS, config.sde)
    x_next = mean + std * draw(seed, x.shape[0])
    return x_next, log_prob(x_next, mean, std, config.sde), mean


def loss_of(velocity, reference, x, x_next, old_log_prob, advantage, config, old_mean=None):
    return grpo_loss(velocity, reference, x, x_next, *LEVELS, old_log_prob, advantage, config, old_mean)


@pytest.mark.parametrize("divide", (False, True))
def test_loss_equals_an_independent_derivation(divide):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    config = GRPOConfig(clip_range=0.002, kl_divide_by_dt=divide, kl_beta=0.5)
    x, old, new, reference = (draw(i) for i in range(4))
    new = old + 0.3 * new
    x_next, old_log_prob, _ = old_policy(old, x, 9, config)
    advantage = jnp.array([2.0, -1.0, 7.0, -0.5])
    loss, metrics = loss_of(new, reference, x, x_next, old_log_prob, advantage, config)

    def tensor(a):
        return torch.from_numpy(np.asarray(a, np.float64))

    t, t_next = tensor(LEVELS[0]), tensor(LEVELS[1])
    dt, s = t_next - t, 0.7 * torch.sqrt(t / (1 - t))

    def normal(v):
        drift = tensor(v) + s**2 / (2 * t) * (tensor(x) + (1 - t) * tensor(v))
        return torch.distributions.Normal(tensor(x) + drift * dt, s * torch.sqrt(-dt))

    logp = normal(new).log_prob(tensor(x_next)).mean(dim=(1, 2, 3))
    ratio = torch.exp(logp - tensor(old_log_prob))
    a = tensor(advantage).clamp(-5, 5)
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(0.998, 1.002))
    kl = torch.distributions.kl_divergence(normal(new), normal(reference)).mean(dim=(1, 2, 3))
    kl = kl if divide else kl * -dt
    np.testing.assert_allclose(metrics["ratio"], ratio, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss, policy + 0.5 * kl, rtol=1e-4)
    np.testing.assert_array_equal(metrics["clip_fraction"], (abs(ratio - 1) > 0.002).float())
    np.testing.assert_allclose(metrics["approx_kl"], 0.5 * (logp - tensor(old_log_prob)) ** 2, rtol=1e-2, atol=1e-9)
    assert 0 < metrics["clip_fraction"].mean() <= 1


@pytest.mark.parametrize("kind", ("flow_grpo", "cps"))
def test_on_policy_ratio_is_one_and_its_gradient_is_the_score(kind):
    config = GRPOConfig(sde=SDEConfig(kind), kl_beta=0.0)
    x, velocity = draw(0), draw(1)
    x_next, old_log_prob, _ = old_policy(velocity, x, 9, config)
    advantage = jnp.array([1.0, -2.0, 0.0, 0.5])

    def loss(v):
        return loss_of(v, None, x, x_next, old_log_prob, advantage, config)[0].sum()

    def score(v):
        mean, std = sde_step_mean_std(v, x, *LEVELS, config.sde)
        return -(advantage * log_prob(x_next, mean, std, config.sde)).sum()

    metrics = loss_of(velocity, None, x, x_next, old_log_prob, advantage, config)[1]
    np.testing.assert_array_equal(metrics["ratio"], 1.0)
    np.testing.assert_array_equal(metrics["clip_fraction"], 0.0)
    assert "kl" not in metrics
    gradient = jax.grad(loss)(velocity)
    np.testing.assert_allclose(gradient, jax.grad(score)(velocity), rtol=1e-5)
    assert np.abs(gradient[0]).max() > 0 and np.abs(gradient[2]).max() == 0


@pytest.mark.parametrize("on_policy", (True, "traced"))
@pytest.mark.parametrize("guard", (False, True))
def test_a_policy_can_be_its_own_old_one(guard, on_policy):
    config = GRPOConfig(guard=guard, kl_beta=0.0)
    x, velocity = draw(0), draw(1)
    x_next, log_probs, mean = old_policy(velocity, x, 9, config)
    advantage = jnp.array([1.0, -2.0, 0.0, 0.5])
    nothing = (None, None) if on_policy is True else (jnp.full(4, 7.0), jnp.full_like(x, -3.0))

    def own(v, flag):
        levels = (x, x_next, *LEVELS, nothing[0], advantage, config, nothing[1])
        loss, metrics = grpo_loss(v, None, *levels, on_policy=on_policy if flag is None else flag)
        return loss.sum(), metrics

    def recorded(v):
        return loss_of(v, None, x, x_next, log_probs, advantage, config, mean)[0].sum()

    gradient, metrics = jax.jit(jax.grad(own, has_aux=True))(velocity, None if on_policy is True else jnp.array(True))
    for name, value in {"ratio": 1.0, "clip_fraction": 0.0, "approx_kl": 0.0}.items():
        np.testing.assert_array_equal(metrics[name], value)
    np.testing.assert_allclose(gradient, jax.grad(recorded)(velocity), rtol=1e-5, atol=1e-9)
    assert np.abs(gradient[0]).max() > 0
    if on_policy == "traced":
        assert np.abs(own(velocity, jnp.array(False))[1]["ratio"] - 1).min() > 0.1


@pytest.mark.parametrize("kl_on", ("mean", "velocity"))
def test_the_kl_carries_gradient_towards_the_reference_only(kl_on):
    config = GRPOConfig(kl_on=kl_on)
    x, velocity, reference = draw(0), draw(1), draw(2)
    x_next, old_log_prob, _ = old_policy(velocity, x, 9, config)

    def loss(v, r):
        return loss_of(v, r, x, x_next, old_log_prob, jnp.zeros(4), config)[0].sum()

    to_policy, to_reference = jax.grad(loss, argnums=(0, 1))(velocity, reference)
    assert (np.asarray(to_reference) == 0).all()
    # With no advantage only the KL is left: its gradient points along velocity - reference.
    away = velocity - reference
    slope = (to_policy * away).sum() / (away * away).sum()
    assert slope > 0
    np.testing.assert_allclose(to_policy, slope * away, rtol=1e-3, atol=1e-7)
    at_reference = jax.grad(loss)(reference, reference)
    np.testing.assert_array_equal(at_reference, 0.0)
    if kl_on == "velocity":
        value = loss_of(velocity, reference, x, x_next, old_log_prob, jnp.zeros(4), config)[1]["kl"]
        np.testing.assert_allclose(value, jnp.mean(away**2, axis=(1, 2, 3)), rtol=1e-5)


def test_clipped_samples_have_no_policy_gradient():
    config = GRPOConfig(clip_range=1e-4, kl_beta=0.0)
    x, old = draw(0), draw(1)
    x_next, old_log_prob, _ = old_policy(old, x, 9, config)
    new = old + 0.3 * (x_next - x)

    def loss(v, advantage):
        return loss_of(v, None, x, x_next, old_log_prob, advantage, config)[0].sum()

    ratio = loss_of(new, None, x, x_next, old_log_prob, jnp.ones(4), config)[1]["ratio"]
    assert (np.abs(ratio - 1) > 1e-4).all()
    # Already past the clip in the direction the advantage asks for: stop. The other way: go on.
    wanted = jnp.where(ratio > 1, 1.0, -1.0)
    assert (np.asarray(jax.grad(loss)(new, wanted)) == 0).all()
    assert (np.abs(jax.grad(loss)(new, -wanted)).max(axis=(1, 2, 3)) > 0).all()


def test_guard_corrects_every_sample_by_itself():
    config = GRPOConfig(guard=True, kl_beta=0.0, clip_range=10.0)
    x, old = draw(0), draw(1)
    new = old + jnp.array([0.0, 0.1, 1.0, 5.0]).reshape(4, 1, 1, 1) * draw(2)
    x_next, old_log_prob, old_mean = old_policy(old, x, 9, config)
    mean, std = sde_step_mean_std(new, x, *LEVELS, config.sde)
    loss, metrics = loss_of(new, None, x, x_next, old_log_prob, jnp.ones(4), config, old_mean)
    # What is left of the log-ratio is the part that is linear in the noise, in units of the step's std.
    noise = (x_next - old_mean) / std
    expected = jnp.exp(jnp.mean(noise * (mean - old_mean), axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics["ratio"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss, -expected / (LEVELS[0] - LEVELS[1]), rtol=1e-4)
    # The first sample's policy did not move; a correction shared by the batch would change its ratio.
    assert float(metrics["ratio"][0]) == 1.0
    alone = loss_of(
        *(a[1:2] for a in (new,)), None, x[1:2], x_next[1:2], old_log_prob[1:2], jnp.ones(1), config, old_mean[1:2]
    )
    np.testing.assert_allclose(alone[0], loss[1:2], rtol=1e-6)


def test_missing_inputs_are_named():
    x, velocity = draw(0), draw(1)
    rest = (x, x, jnp.zeros(4), jnp.zeros(4))
    with pytest.raises(ValueError, match="reference velocity"):
        loss_of(velocity, None, *rest, GRPOConfig())
    with pytest.raises(ValueError, match="old policy's means"):
        loss_of(velocity, None, *rest, GRPOConfig(guard=True, kl_beta=0.0))


def test_flow_dppo_holds_back_what_has_moved_and_would_move_further():
    """Its formula in float64: left out where D >= tau and the ratio is on the side that the advantage asks for."""
    config = GRPOConfig(trust="dppo", trust_tau=1e-3, kl_beta=0.0)
    x, old = draw(0, 8), draw(1, 8)
    # Some steps move by little, some by more than tau, towards what was sampled or away from it.
    x_next, old_log_prob, old_mean = old_policy(old, x, 9, config)
    sizes = jnp.array([0.0, 0.01, 0.3, 0.3, -0.3, -0.3, 0.01, -0.01]).reshape(8, 1, 1, 1)
    new = old - sizes * (x_next - old_mean) * 4
    advantage = jnp.array([1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 7.0])

    def total(v):
        loss, metrics = loss_of(v, None, x, x_next, old_log_prob, advantage, config, old_mean)
        return loss.sum(), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(new)
    mean, std = (np.asarray(a, np.float64) for a in sde_step_mean_std(new, x, *LEVELS, config.sde))
    noise, before = np.asarray(x_next, np.float64), np.asarray(old_mean, np.float64)
    per_sample = lambda a: a.reshape(8, -1).mean(axis=1)
    ratio = np.exp(per_sample((noise - before) ** 2 - (noise - mean) ** 2) / (2 * std**2))
    moved = per_sample((mean - before) ** 2) / (2 * std**2)
    clipped = np.clip(advantage, -5, 5)
    further = ((ratio > 1) & (clipped > 0)) | ((ratio < 1) & (clipped < 0))
    held = (moved >= 1e-3) & further
    assert 0 < held.sum() < 8 and (further & ~held).any() and ((moved >= 1e-3) & ~held).any()
    np.testing.assert_allclose(metrics["moved"], moved, rtol=2e-3, atol=1e-9)
    np.testing.assert_allclose(loss, np.where(held, 0, -clipped * ratio), rtol=1e-3)
    np.testing.assert_array_equal(metrics["clip_fraction"], held)
    silent = np.abs(gradient).max(axis=(1, 2, 3)) == 0
    np.testing.assert_array_equal(silent, held)


def test_flow_dppo_needs_means_and_holds_nothing_on_policy():
    config = GRPOConfig(trust="dppo", kl_beta=0.0)
    x, velocity = draw(0), draw(1)
    x_next, log_probs, mean = old_policy(velocity, x, 9, config)
    with pytest.raises(ValueError, match=r"trust='dppo' needs the old policy's means"):
        loss_of(velocity, None, x, x_next, log_probs, jnp.ones(4), config)
    loss, metrics = loss_of(velocity, None, x, x_next, log_probs, jnp.ones(4), config, mean)
    assert (np.asarray(metrics["clip_fraction"]) == 0).all() and (np.asarray(loss) == -1).all()
    for wrong, words in (
        ({"trust": "dppo", "guard": True}, "without guard"),
        ({"trust": "dppo", "sde": SDEConfig("cps")}, "flow_grpo SDE"),
        ({"trust": "hope"}, "choose one of clip, dppo"),
        ({"trust_tau": 0.0}, "trust_tau is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            GRPOConfig(**wrong)
