"""Where the pictures of an edit go: to the vision-language model, as latents into the transformer, or to both (paper, Table 2)."""

import dataclasses

import numpy as np
import pytest

from unipic2_jax.core.assets import TINY_METAQUERY
from unipic2_jax.core.errors import ConfigError
from unipic2_jax.pipelines import Pipeline, load_bundle
from unipic2_jax.shapes.world import Scene, Thing, render
from unipic2_jax.training import loop, setup
from unipic2_jax.training.config import make_config

PICTURES = [render(Scene("white", (Thing(shape="circle", color="red", size="large", cell=cell),))) for cell in (0, 8)]
EDIT = "make the red circle green"


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(TINY_METAQUERY)


def pipeline(bundle, path):
    conditioner = dataclasses.replace(bundle.conditioner, reference_path=path)
    return Pipeline(bundle.replace(conditioner=conditioner))


def test_the_language_model_is_shown_the_picture_or_not(bundle):
    tokens = {
        path: dataclasses.replace(bundle.conditioner, reference_path=path).tokenize([EDIT], [[PICTURES[0]]])
        for path in ("both", "mllm", "dit")
    }
    assert tokens["both"].vision is not None and tokens["dit"].vision is None
    assert np.array_equal(tokens["both"].input_ids, tokens["mllm"].input_ids)
    text = lambda found: bundle.conditioner.processor.tokenizer.decode(found.input_ids[0][np.asarray(found.valid[0])])
    # An instruction stays one without its picture.
    assert EDIT in text(tokens["dit"]) and "generate" not in text(tokens["dit"])
    assert "generate" in text(bundle.conditioner.tokenize([EDIT]))


def test_the_transformer_attends_to_the_picture_or_not(bundle):
    """What is blind to the transformer's reference does not see another one in its place, given the same conditioning."""
    made = {}
    for path in ("both", "mllm", "dit"):
        pipe = pipeline(bundle, path)
        options = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0, "height": 48, "width": 48}
        made[path] = [np.asarray(pipe(EDIT, image=picture, **options).images[0], int) for picture in PICTURES]
    differs = {path: np.abs(one - two).mean() for path, (one, two) in made.items()}
    # Every path shows the two pictures apart, the latents more clearly than what the vision-language model says of them.
    assert all(value > 0 for value in differs.values())
    assert differs["dit"] > differs["mllm"] and differs["both"] > differs["mllm"]
    assert not np.array_equal(made["both"][0], made["mllm"][0]) and not np.array_equal(made["both"][0], made["dit"][0])


def test_a_run_chooses_the_path_and_exports_it(tmp_path):
    from configs import unified

    config = unified.get_config("tiny,smoke")
    config.settings.reference_path = "mllm"
    config.stages.unified.evaluations = {}
    config.stages.unified.steps = 2
    config.stages.unified.optimizer.warmup = 1
    loop.run(config, tmp_path / "run")
    assert load_bundle(tmp_path / "run" / "export").conditioner.reference_path == "mllm"


def test_settings_that_do_not_exist():
    with pytest.raises(ValueError, match="choose one of both, mllm, dit"):
        dataclasses.replace(load_bundle(TINY_METAQUERY).conditioner, reference_path="everywhere")
    config = make_config({"init": str(TINY_METAQUERY), "settings": {"reference_paths": "mllm"}, "schedule": ("x",)})
    with pytest.raises(ConfigError, match="did you mean 'reference_path'"):
        setup.load_model(config, None)
