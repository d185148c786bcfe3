"""Every recipe and variant is complete, and the tiny ones can start."""

import importlib

import jax
import pytest

from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.pipelines.bundle import load_bundle
from unipic2_jax.training import loop
from unipic2_jax.training.config import ConfigError, validate
from unipic2_jax.training.metrics import read_rows
from unipic2_jax.training.stage import stage_class

TINY = {
    "tiny": ("", "smoke"),
    "tiny_vae": ("", "smoke"),
    "tiny_vlm": ("", "smoke"),
    "tiny_metaquery": ("", "smoke"),
    "pdtr": ("tiny", "tiny,long", "tiny,smoke", "tiny,model=metaquery"),
    "connector": ("tiny", "tiny,smoke"),
    "kontext": ("tiny", "tiny,smoke"),
    "unified": ("tiny", "tiny,smoke"),
    "unipic2": ("tiny", "tiny,smoke"),
    "ablations": ("connector,x", "mllm,x", "connector_only,x,smoke"),
}


def recipe(name, arg):
    return validate(importlib.import_module(f"configs.{name}").get_config(arg))


@pytest.mark.parametrize("name,arg", [(name, arg) for name, found in TINY.items() for arg in found])
def test_a_tiny_recipe_can_start(name, arg):
    config, mesh = recipe(name, arg), make_mesh(jax.devices()[:1])
    for stage in config.stages.values():
        stage_class(stage.kind).check(stage, mesh)


@pytest.mark.parametrize("name", ["connector", "kontext", "unified", "unipic2"])
def test_a_full_recipe_asks_for_its_data_first(name, tmp_path):
    with pytest.raises(ConfigError, match="prepared data without a path"):
        loop.run(recipe(name, ""), tmp_path / "run")


def test_the_papers_numbers():
    config = recipe("unipic2", "")
    assert config.schedule == ("connector", "kontext", "unified", "edit", "t2i")
    numbers = {name: (s.steps, s.batch_size, s.optimizer.lr) for name, s in config.stages.items() if s.kind == "flow"}
    assert numbers == {
        "connector": (500_000, 1024, 1e-4),
        "kontext": (200_000, 128, 4e-5),
        "unified": (200_000, 128, 4e-5),
    }
    for name in numbers:
        optimizer = config.stages[name].optimizer
        assert (tuple(optimizer.betas), optimizer.eps, optimizer.weight_decay) == ((0.9, 0.95), 1e-8, 0.05)
        assert optimizer.schedule == "cosine" and optimizer.warmup == config.stages[name].steps // 100
    assert (config.stages.kontext.model, config.stages.unified.model) == ("text", None)


def test_words_that_a_recipe_does_not_know():
    for name in ("connector", "kontext", "unified", "unipic2"):
        with pytest.raises(ValueError, match="has no variant 'tin'"):
            recipe(name, "tin")
        with pytest.raises(ValueError, match="write tiny,smoke"):
            recipe(name, "smoke")


@pytest.mark.slow
def test_the_whole_paper_in_a_few_steps(tmp_path):
    config = recipe("unipic2", "tiny,smoke")
    folder = loop.run(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {row["stage"] for row in rows if row["kind"] == "train"} == set(config.schedule)
    assert "conditioner" in load_bundle(folder).params["conditioner"]
