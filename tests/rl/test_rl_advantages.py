"""Rewards to advantages, the moving average, and the config's checks."""

import jax.numpy as jnp
import numpy as np
import pytest

from unipic2_jax.flow.sde import SDEConfig
from unipic2_jax.optim.ema import ema_decay, ema_update
from unipic2_jax.rewards.combine import combine_rewards
from unipic2_jax.rl.advantages import group_advantages
from unipic2_jax.rl.config import GRPOConfig

NAN = float("nan")


def test_advantages_by_hand():
    rewards = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])
    got, stats = group_advantages(rewards)
    assert got.dtype == np.float32 and got.shape == (2, 3)
    np.testing.assert_allclose(got[0], (rewards[0] - 2) / (np.sqrt(2 / 3) + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(got[1], (rewards[1] - 2) / (np.sqrt(8) + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, global_std=True)[0], (rewards - 2) / (rewards.std() + 1e-4))
    assert stats["zero_variance_fraction"] == 0 and stats["failed"] == 0 and stats["reward_mean"] == 2.0


def test_group_keys_may_be_scattered_and_unequal():
    rewards = np.array([1.0, 10.0, 3.0, 30.0, 20.0])
    got, _ = group_advantages(rewards, groups=[("cat", 1), ("cat", 2), ("cat", 1), ("cat", 2), ("cat", 2)])
    np.testing.assert_allclose(got[[0, 2]], group_advantages(rewards[[0, 2]][None])[0][0])
    np.testing.assert_allclose(got[[1, 3, 4]], group_advantages(rewards[[1, 3, 4]][None])[0][0])


@pytest.mark.parametrize("global_std", (False, True))
def test_a_failed_reward_is_left_out_and_is_not_zero(global_std):
    with_failure, stats = group_advantages(np.array([[5.0, 6.0, NAN], [1.0, 2.0, 3.0]]), global_std=global_std)
    assert with_failure[0, 2] == 0 and stats["failed"] == 1 and np.isfinite(with_failure).all()
    without, _ = group_advantages(np.array([5.0, 6.0, 1.0, 2.0, 3.0]), [0, 0, 1, 1, 1], global_std=global_std)
    np.testing.assert_allclose(with_failure[0, :2], without[:2])
    # As a reward of 0 it would have pulled the group's mean from 5.5 to 3.7 and made 5.0 a good sample.
    assert with_failure[0, 0] < 0
    masked, stats = group_advantages(
        np.array([[5.0, 6.0, 0.0], [1.0, 2.0, 3.0]]), valid=[[1, 1, 0], [1, 1, 1]], global_std=global_std
    )
    np.testing.assert_array_equal(masked, with_failure)
    assert stats["failed"] == 1


def test_groups_that_teach_nothing():
    rewards = np.array([[0.1, 0.1, 0.1], [NAN, NAN, NAN], [NAN, NAN, 4.0], [1.0, 2.0, 9.0]])
    got, stats = group_advantages(rewards)
    assert (got[:3] == 0).all() and (got[3] != 0).all()
    assert stats["zero_variance_fraction"] == 0.75 and stats["failed"] == 5
    nothing, stats = group_advantages(np.full((1, 2), NAN))
    assert (nothing == 0).all() and np.isnan(stats["reward_mean"]) and stats["failed"] == 2


def test_clip_and_bad_input():
    rewards = np.zeros((1, 100))
    rewards[0, 0] = 1.0
    assert group_advantages(rewards)[0][0, 0] == 5.0
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(np.array([[1.0, np.inf]]))
    with pytest.raises(ValueError, match="without groups"):
        group_advantages(np.zeros(4))
    with pytest.raises(ValueError, match="3 group keys"):
        group_advantages(np.zeros(4), [0, 0, 1])


def test_combined_rewards():
    rewards = {"follow": np.array([1.0, NAN]), "keep": np.array([0.5, 1.0])}
    np.testing.assert_array_equal(combine_rewards(rewards, (("follow", 2.0), ("keep", 1.0))), [2.5, NAN])
    np.testing.assert_array_equal(combine_rewards({"keep": rewards["keep"]}), [0.5, 1.0])
    with pytest.raises(ValueError, match="without weights"):
        combine_rewards(rewards)
    with pytest.raises(ValueError, match="beauty"):
        combine_rewards(rewards, (("beauty", 1.0),))


def test_ema_follows_flow_grpo():
    assert float(ema_decay(0)) == pytest.approx(0.1)
    assert float(ema_decay(1000, 0.9)) == pytest.approx(0.9)
    average, value = {"w": jnp.zeros(2)}, {"w": jnp.ones(2, jnp.bfloat16)}
    average = ema_update(average, value, 0)
    np.testing.assert_allclose(average["w"], 0.9, rtol=1e-6)
    assert average["w"].dtype == jnp.float32
    # Every 8th step only, counted so that the 8th (number 7) moves.
    still = ema_update(average, {"w": jnp.zeros(2)}, 6, 0.9, 8)
    np.testing.assert_array_equal(still["w"], average["w"])
    np.testing.assert_allclose(ema_update(average, {"w": jnp.zeros(2)}, 7, 0.9, 8)["w"], 0.9 * 8 / 17, rtol=1e-6)


def test_config_defaults_are_the_papers():
    config = GRPOConfig()
    assert (config.num_steps, config.group_size, config.sde.noise_level, config.kl_beta) == (10, 16, 0.7, 0.04)
    assert config.trainable_steps == config.trained_steps == 9
    assert GRPOConfig(window=(2, (0, 5))).trained_steps == 2
    hash(config)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"num_steps": 0}, "num_steps"),
        ({"group_size": 1}, "group_size"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"adv_clip_max": -1.0}, "adv_clip_max"),
        ({"kl_beta": -0.1}, "kl_beta"),
        ({"kl_on": "latents"}, "kl_on"),
        ({"old_log_probs": "judge"}, "old_log_probs"),
        ({"kl_on": "velocity", "kl_divide_by_dt": True}, "kl_divide_by_dt"),
        ({"guard": True, "sde": SDEConfig("cps")}, "guard"),
        ({"timestep_fraction": 0.0}, "timestep_fraction"),
        ({"num_steps": 1}, "trains none"),
        ({"timestep_fraction": 1.0, "sde": SDEConfig("cps")}, "last cps step"),
        ({"window": (3, (7, 9))}, "window"),
        ({"window": (2, (8, 10))}, "trainable steps"),
        ({"cfg_in_window": False}, "needs a window"),
        ({"updates_per_rollout": 0}, "updates_per_rollout"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_interval": 0}, "ema_interval"),
        ({"weights": (("a", 1.0), ("a", 2.0))}, "twice"),
        ({"weights": (("a", NAN),)}, "finite"),
    ],
)
def test_config_refuses(fields, word):
    with pytest.raises(ValueError, match=word):
        GRPOConfig(**fields)
