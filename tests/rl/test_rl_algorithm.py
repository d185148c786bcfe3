"""The seam: algorithms register themselves as kinds of stages, and their rollouts are joined and placed without knowing them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from unipic2_jax.core.errors import ConfigError, TrainingPaused
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rl.algorithm import ALGORITHMS, Layout, Passes, algorithm_fields, join, make_algorithm, places
from unipic2_jax.rl.config import RLConfig
from unipic2_jax.rl.feedback import count_failures, no_failures
from unipic2_jax.rl.grpo import GRPO
from unipic2_jax.rl.nft import NFT, Finished
from unipic2_jax.rl.rollout import Trajectory
from unipic2_jax.training.config import make_stage
from unipic2_jax.training.stage import STAGES, stage_class


def stage(kind, **fields):
    return make_stage({"kind": kind, "rewards": {"a": {"weight": 2.0}, "watched": {"weight": 0.0}}, **fields})


@pytest.mark.parametrize("kind", ("grpo", "nft"))
def test_an_algorithm_is_a_kind_of_stage_with_its_own_fields(kind):
    assert kind in STAGES and stage_class(kind) is stage_class(kind)
    config = stage(kind)
    assert config.kind == kind == ALGORITHMS[kind].name
    algorithm = make_algorithm(config, devices=4)
    assert algorithm_fields(config) is config[kind] and ({"grpo", "nft"} - {kind}).pop() not in config
    # What is not said is what the class has, and the defaults of a configuration are those of the dataclass.
    defaults = dataclasses.replace(ALGORITHMS[kind].Config(), weights=(("a", 2.0),))
    assert algorithm.config == defaults and isinstance(algorithm.config, RLConfig)
    few = stage(kind, **{kind: {"micro_batch": 2}})
    assert make_algorithm(few, devices=4).micro_batch == 4 and make_algorithm(few, devices=1).micro_batch == 2


def test_a_field_of_another_algorithm_is_none():
    with pytest.raises(ConfigError, match=r"stage\.nft\.window is not a field"):
        stage("nft", nft={"window": {"size": 1}})
    with pytest.raises(
        ValueError, match=r"NFT: guidance_scale is 3\.5; DiffusionNFT samples and trains without guidance"
    ):
        make_algorithm(stage("nft", nft={"guidance_scale": 3.5}))
    with pytest.raises(ValueError, match="same_latent gives the samples of a group one noise"):
        make_algorithm(stage("nft", same_latent=True))
    assert algorithm_fields(make_stage({"kind": "flow"})) is None


def test_whoever_registers_one_has_a_kind_of_stage():
    @ALGORITHMS.register("mine")
    class Mine(NFT):
        name = "mine"
        stage_defaults = {"num_prompts": 3}  # noqa: RUF012

    try:
        config = stage("mine", mine={"solver": "euler"})
        assert config.num_prompts == 3 and make_algorithm(config).config.solver == "euler"
    finally:
        del ALGORITHMS["mine"]
    assert "mine" not in STAGES


def test_passes():
    layout = Layout(4, 8)
    assert (layout.samples, Layout(4, 8, 2).samples_at_once, Layout(4, 8, 2).prompts_at_once) == (32, 16, 2)
    # Ten steps; all but one trained; of each a forward and a backward pass, the reference, and the second update's old policy.
    passes = GRPO(GRPO.Config(guidance_scale=1.0), layout).passes()
    assert passes == Passes(320, 288, 288 + 144)
    assert GRPO(GRPO.Config(guidance_scale=2.0, kl_beta=0.0), layout).passes() == Passes(640, 576, 288)
    window = GRPO.Config(guidance_scale=1.0, window=(1, (0, 4)), kl_beta=0.0, updates_per_rollout=1)
    shared = GRPO(window, dataclasses.replace(layout, same_latent=True))
    assert shared.passes(3) == Passes(4 * 4 + 6 * 32, 4, 0) and shared.passes() == shared.passes(2)
    assert NFT(NFT.Config(), layout).passes() == Passes(320, 288, 2 * 288)
    assert NFT(NFT.Config(kl_beta=0.0, timestep_fraction=0.2), layout).passes() == Passes(320, 64, 64)
    assert passes.flops(10) == (3200, 10 * (2 * 288 + 432))


def test_rollouts_are_joined_along_their_samples():
    sigmas, steps = jnp.linspace(1, 0, 3), jnp.array([1])
    part = lambda value: Trajectory(jnp.full((3, 2, 4), value), jnp.full((2, 2), value), None, sigmas, steps)
    inputs = [{"cond": {"context": jnp.full((2, 5), value)}} for value in (1.0, 2.0)]
    joined, given = jax.jit(join)([(part(1.0), inputs[0]), (part(2.0), inputs[1])])
    assert joined.latents.shape == (3, 4, 4) and joined.means is None and joined.steps.shape == (1,)
    np.testing.assert_array_equal(joined.finished[:, 0], [1, 1, 2, 2])
    np.testing.assert_array_equal(given["cond"]["context"][:, 0], [1, 1, 2, 2])
    finished, _ = join([(Finished(jnp.ones((2, 4)), sigmas), {}), (Finished(jnp.zeros((2, 4)), sigmas), {})])
    assert finished.finished.shape == (4, 4) and finished.sigmas.shape == (3,)


def test_rollouts_are_split_over_devices_along_their_samples():
    found = places(Trajectory, make_mesh(jax.devices()[:1]))
    assert found.latents.spec[0] is None and found.latents.spec[1] and found.sigmas.spec == PartitionSpec()
    assert places(Finished, make_mesh(jax.devices()[:1])).latents.spec[0]


def test_failures_are_counted_over_a_window():
    count = lambda failures, failed, step: count_failures(failures, failed, 8, 0.5, step, "edit", "ocr")
    failures = no_failures(3)
    for step, failed in enumerate((8, 0, 0, 8)):
        failures = count(failures, failed, step)
    assert failures.tolist() == [0, 0, 8]
    failures = count(failures, 4, 4)  # half of all: within the budget
    with pytest.raises(
        TrainingPaused, match=r"62% of the samples of stage 'edit' .* in the 3 steps up to step 5; repair .*ocr"
    ):
        count(np.array([0, 8, 0]), 7, 5)
    # What works again is not stopped at for what came before.
    assert count(np.array([8, 8, 8]), 0, 6).tolist() == [8, 8, 0]
