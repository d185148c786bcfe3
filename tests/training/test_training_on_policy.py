"""Reinforcement in bfloat16 and micro-batches, through the whole stage: the first update is on-policy to the bit."""

import json
import os
import subprocess
import sys

import pytest

STEP = """
import json, sys
from pathlib import Path

import jax

from configs import pdtr
from unipic2_jax.weights.precision import PRECISIONS
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.rl import rollout
from unipic2_jax.training import setup
from unipic2_jax.training.config import validate
from unipic2_jax.training.stage import StageContext, stage_class

folder, whose, excess = sys.argv[1:]
rollout.COMPILER_OPTIONS["xla_allow_excess_precision"] = excess == "excess"
config = pdtr.get_config("tiny,smoke,t2i=none")
stage = config.stages.edit
config.precision, stage.evaluations = "mixed", {}
# One optimizer step, so that all samples belong to the first.
fields = {"num_steps": 10, "guidance_scale": 3.5, "micro_batch": 4, "updates_per_rollout": 1, "old_log_probs": whose}
stage.grpo.update(fields)
stage.grpo.window.size = 0
config, mesh = validate(config), make_mesh(jax.devices()[:1])
context = StageContext("edit", 0, 0, mesh, Path(folder), log=str, precision=PRECISIONS["mixed"])
with jax.set_mesh(mesh):
    made = stage_class("grpo")(config.stages.edit, setup.load_model(config, mesh), context)
    print(json.dumps(made.step(made.init(), 0)[1]))
"""


def first_step(folder, whose, excess="exact"):
    """Metrics of UniPic2-Tiny's first step: rollouts of 32 samples and ten stochastic steps, passes of 4 samples.

    In a process without the suite's XLA_FLAGS: hundreds of passes are worth an optimising compiler.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", STEP, str(folder), whose, excess]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_first_update_is_on_policy_to_the_bit(tmp_path):
    metrics = first_step(tmp_path, "trainer")
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["gradient_norm"] > 0
    # The sampler's log-probabilities are others.
    assert metrics["log_prob_difference_max"] > 1e-6


@pytest.mark.slow
def test_the_samplers_log_probabilities_are_not(tmp_path):
    """With excess precision, as XLA compiles unless it is told otherwise."""
    metrics = first_step(tmp_path, "sampler", "excess")
    assert metrics["clip_fraction"] > 0.1 and metrics["log_prob_difference"] > 1e-4
