"""DeepGen's supervised recipe: what it says, what it trains, and that a run that stops goes on with the same bits."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from deepgen_reference import LORA, SMALL, VLM
from pipelines_common import SIZES, small_bundle
from qwen_reference import processor

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models.bundle import load_bundle
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training import loop
from unipic2_jax.training.config import make_config, validate
from unipic2_jax.training.metrics import read_rows
from unipic2_jax.training.stage import stage_class
from unipic2_jax.training.stages.flow import FlowStage

NETWORKS = {
    **{name: SIZES.networks[name] for name in ("transformer", "vae")},
    "conditioner": dataclasses.replace(SMALL, joint_attention_dim=32, pooled_projection_dim=32),
    "vlm": VLM,
    "lora": LORA,
}
SETTINGS = {"vision_scale": 1.0, "max_sequence_length": 192}
TOGETHER = "^(transformer|conditioner/(conditioner|lora))/"


def recipe(arg):
    return validate(importlib.import_module("configs.deepgen").get_config(arg))


def model(*_):
    """A small one, whatever the configuration says."""
    sizes = dataclasses.replace(SIZES, family="deepgen", networks=NETWORKS, settings=SETTINGS)
    made = small_bundle(sizes, 0, processor(VLM))
    return made.replace(params=jax.tree.map(jax.device_put, made.params))


def train(workdir):
    """Four steps of the second stage on a model small enough to be compiled in seconds."""
    stage = {
        "kind": "flow",
        "steps": 4,
        "save_every": 1,
        "log_every": 1,
        "data": {"kind": "shapes"},
        "tasks": ("edit", "t2i"),
        "batch_size": 4,
        "loader_threads": 1,
        "optimizer": {"lr": 1e-2, "trainable": TOGETHER},
    }
    config = make_config({"schedule": ("sft",), "stages": {"sft": stage}})
    return load_bundle(loop.run(config, workdir, load=model))


@pytest.mark.parametrize("arg", ["tiny", "tiny,smoke"])
def test_a_tiny_recipe_can_start(arg):
    mesh = make_mesh(jax.devices()[:1])
    for stage in recipe(arg).stages.values():
        stage_class(stage.kind).check(stage, mesh)


def test_the_full_recipe_has_the_originals_numbers(tmp_path):
    config = recipe("")
    # Iterations of 256 examples, an update after each turn of tasks.
    numbers = {n: (s.steps, s.batch_size, s.optimizer.lr) for n, s in config.stages.items()}
    assert numbers == {"align": (50_000, 1024, 1e-4), "sft": (133_333, 768, 5e-5)}
    assert [stage.tasks.count("t2i") for stage in config.stages.values()] == [3, 2]
    for stage in config.stages.values():
        optimizer = stage.optimizer
        assert (tuple(optimizer.betas), optimizer.weight_decay, optimizer.clip_norm) == ((0.9, 0.95), 0.05, 1.0)
        assert optimizer.schedule == "cosine" and optimizer.warmup == stage.steps // 100
        assert stage.timesteps.kind == "uniform" and stage.timesteps.shift is None
        assert stage.caption_dropout.to_dict() == {"t2i": 0.1, "edit": 0.0} and stage.ema_decay == 0
    assert [s.optimizer.trainable for s in config.stages.values()] == ["^conditioner/conditioner/", TOGETHER]
    assert config.zero_projectors and config.settings.max_sequence_length == 256
    with pytest.raises(ConfigError, match="prepared data without a path"):
        loop.run(config, tmp_path / "run")


def test_all_that_should_learns_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    whole, before = train(tmp_path / "whole"), model()
    moved = lambda *path: [
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(*(jax.tree.leaves(_at(made.params, path)) for made in (whole, before)), strict=True)
    ]
    assert max(moved("conditioner", "vlm")) == max(moved("vae")) == 0
    for part in (("transformer",), ("conditioner", "conditioner"), ("conditioner", "lora")):
        assert np.mean(np.array(moved(*part)) > 0) > 0.9, part
    rows = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if row["kind"] == "train"]
    assert all(np.isfinite(row["loss"]) for row in rows) and len(rows) == 4

    step = FlowStage.step

    def stopping(self, state, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, state, number)

    with monkeypatch.context() as patch:
        patch.setattr(FlowStage, "step", stopping)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(tmp_path / "run")
    again = train(tmp_path / "run")
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
