"""Reinforcement in bfloat16 and micro-batches, through the whole stage: the first update is on-policy to the bit."""

import jax
import pytest

from configs import pdtr
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rl import rollout
from unipic2_jax.training import loop
from unipic2_jax.training.config import validate
from unipic2_jax.training.grpo_stage import GRPOStage
from unipic2_jax.training.stage import StageContext


def first_step(folder, **grpo):
    """Metrics of UniPic2-Tiny's first step: rollouts of 32 samples and ten stochastic steps, passes of 4 samples."""
    config = pdtr.get_config("tiny,smoke,t2i=none")
    stage = config.stages.edit
    stage.compute_dtype, stage.evaluations = "bfloat16", {}
    # One optimizer step, so that all samples belong to the first.
    stage.grpo.update({"num_steps": 10, "guidance_scale": 3.5, "micro_batch": 4, "updates_per_rollout": 1, **grpo})
    stage.grpo.window.size = 0
    config, mesh = validate(config), make_mesh(jax.devices()[:1])
    made = GRPOStage(
        config.stages.edit, loop.load_bundle(config, mesh), StageContext("edit", 0, 0, mesh, folder, log=str)
    )
    with jax.set_mesh(mesh):
        return made.step(made.init(), 0)[1]


@pytest.fixture(autouse=True)
def compiled_well(monkeypatch):
    """Hundreds of passes are worth an optimising compiler."""
    monkeypatch.setitem(rollout.COMPILER_OPTIONS, "xla_backend_optimization_level", 3)
    monkeypatch.setitem(rollout.COMPILER_OPTIONS, "xla_llvm_disable_expensive_passes", False)


def test_the_first_update_is_on_policy_to_the_bit(tmp_path):
    metrics = first_step(tmp_path)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["gradient_norm"] > 0
    # The sampler's log-probabilities are others.
    assert metrics["log_prob_difference_max"] > 1e-6


@pytest.mark.slow
def test_the_samplers_log_probabilities_are_not(tmp_path, monkeypatch):
    """With excess precision, as XLA compiles unless it is told otherwise."""
    monkeypatch.setitem(rollout.COMPILER_OPTIONS, "xla_allow_excess_precision", True)
    metrics = first_step(tmp_path, old_log_probs="sampler")
    assert metrics["clip_fraction"] > 0.1 and metrics["log_prob_difference"] > 1e-4
