"""A run in mixed precision: what is trained, what is frozen, what goes from stage to stage, and going on after a stop."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_flow
import toy_grpo
from prepared_files import write_prepared
from toy_grpo import Brightness

from configs import kontext, pdtr
from unipic2_jax.core.errors import ConfigError
from unipic2_jax.data.buckets import Bucket
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.perf.blank_model import abstract_bundle
from unipic2_jax.training import loop
from unipic2_jax.training.checkpoints import Checkpoints
from unipic2_jax.training.config import make_config, validate
from unipic2_jax.training.stages.flow import FlowStage

BRAIN, SINGLE = jnp.dtype("bfloat16"), np.dtype("float32")


def run(workdir, data, written):
    """The conditioner learns, then the transformer is reinforced."""
    optimizer = {"lr": 3e-3, "trainable": "^conditioner/", "weight_decay": 0.0}
    flow = toy_flow.fields(data, steps=2, tasks=("t2i",), save_every=1, optimizer=optimizer)
    stages = {"flow": flow, "grpo": toy_grpo.stage(steps=2, evaluations={})}
    config = make_config({"precision": "mixed", "schedule": tuple(stages), "stages": stages})

    def save(bundle, folder, changed):
        written.append((bundle.params, set(changed)))
        toy_grpo.save(bundle, folder, changed)

    return loop.run(config, workdir, load=toy_grpo.load, save=save, mesh=make_mesh(jax.devices()[:1]))


def test_what_is_trained_is_float32_and_stopped_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    data = write_prepared(tmp_path / "data", {Bucket("1:1"): 16}, toy_flow.RESOLUTION, toy_flow.MULTIPLE)
    step, states, written = FlowStage.step, [], []

    def watched(self, state, number):
        states.append((state, self.frozen))
        return step(self, state, number)

    monkeypatch.setattr(FlowStage, "step", watched)
    whole = run(tmp_path / "whole", data, written)
    (state, frozen), (params, changed) = states[0], written[0]
    assert {leaf.dtype for leaf in jax.tree.leaves((state.trained, state.ema))} == {SINGLE}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {BRAIN}
    # Exported are the conditioner, which is frozen in the second stage, and the matrices that have a LoRA there.
    adapted = {path for path in changed if path.startswith("transformer/")}
    assert changed - adapted == {"conditioner/table"} and adapted
    assert all("/attn/" in path and path.endswith("/kernel") for path in adapted)
    flat = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert {path for path, leaf in flat.items() if leaf.dtype == SINGLE} == adapted
    # Between the stages it was float32.
    stored = Checkpoints(tmp_path / "whole" / "checkpoints", 1).load_params(1, toy_grpo.load().params, make_mesh())[0]
    assert stored["conditioner"]["table"].dtype == SINGLE
    assert not np.array_equal(stored["conditioner"]["table"], toy_grpo.load().params["conditioner"]["table"])

    def stopped(self, state, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, state, number)

    monkeypatch.setattr(FlowStage, "step", stopped)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", data, [])
    monkeypatch.setattr(FlowStage, "step", step)
    Brightness.trouble = toy_grpo.stop_at_call(1)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", data, [])
    Brightness.trouble = None
    parts = run(tmp_path / "parts", data, [])
    with np.load(whole / "params.npz") as a, np.load(parts / "params.npz") as b:
        assert set(a.files) == set(b.files) and all(a[name].tobytes() == b[name].tobytes() for name in a.files)


def test_full_size_recipes_are_planned_as_they_are_kept():
    mesh = make_mesh(jax.devices()[:1])
    for recipe in (pdtr, kontext):
        params = abstract_bundle(recipe.get_config(), mesh).params
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {BRAIN}
    tiny = pdtr.get_config("tiny,smoke")
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_bundle(tiny, mesh).params)} == {SINGLE}


def test_an_unknown_precision_is_refused():
    config = pdtr.get_config("tiny,smoke")
    config.precision = "mixd"
    with pytest.raises(ConfigError, match=r"config\.precision is 'mixd'; did you mean 'mixed'"):
        validate(config)
