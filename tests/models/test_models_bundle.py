"""A model folder: written and read back, and every way in which it can be incomplete."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from pipelines_common import SIZES, small_bundle, text_tokenizers

from unipic2_jax import pipelines
from unipic2_jax.models import bundle as bundles
from unipic2_jax.models import convert
from unipic2_jax.models.conditioner import tokenize_negative
from unipic2_jax.models.sd3.conditioner import EDIT_NEGATIVE
from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.perf.blank_model import abstract_bundle
from unipic2_jax.pipelines.request import picture_size
from unipic2_jax.training.config import make_config
from unipic2_jax.weights import io


@pytest.fixture(scope="module")
def bundle():
    return small_bundle()


@pytest.fixture(scope="module")
def saved(bundle, tmp_path_factory):
    return pipelines.save_bundle(bundle, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


def assert_same_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_is_exact(bundle, saved):
    loaded = pipelines.load_bundle(saved)
    assert_same_params(loaded.params, bundle.params)
    for name in ("transformer", "vae"):
        assert getattr(loaded, name).config == getattr(bundle, name).config
    assert loaded.scheduler == bundle.scheduler
    assert loaded.conditioner.max_sequence_length == SIZES.settings["max_sequence_length"]
    tokens = [b.conditioner.tokenize(["a red circle", "zebra"]) for b in (loaded, bundle)]
    assert_same_params(*tokens)
    assert (loaded.default_size, loaded.patch_pixels, loaded.largest_size) == (24, 8, 64)


def test_models_of_full_size_have_the_published_defaults():
    mesh = make_mesh(jax.devices()[:1])
    for model, size, negative in (
        ("sd35_medium", 512, EDIT_NEGATIVE),
        ("unipic2_metaquery", 512, EDIT_NEGATIVE),
        ("tiny", 48, ""),
        ("tiny_metaquery", 48, ""),
    ):
        bundle = abstract_bundle(make_config({"model": model}), mesh)
        assert bundle.default_size == size
        assert [bundle.conditioner.default_negative(is_edit) for is_edit in (False, True)] == ["", negative]
        # The picture's size, with and without one to edit.
        assert picture_size(bundle, None, None, ()) == (size, size)
        assert picture_size(bundle, None, None, (Image.new("RGB", (700, 700)),)) == (size, size)
    for folder in (pipelines.TINY, pipelines.TINY_METAQUERY):
        assert json.loads((Path(folder) / "unipic2.json").read_text())["edit_negative"] == ""


def test_a_negative_prompt_that_nobody_says_is_the_conditioners(bundle):
    conditioner = dataclasses.replace(bundle.conditioner, edit_negative="blurry")
    picture = Image.new("RGB", (24, 24))
    for given, images, wanted in (
        (None, [[picture]], "blurry"),
        (None, None, ""),
        ("a red circle", [[picture]], "a red circle"),
        ("", [[picture]], ""),
    ):
        assert_same_params(tokenize_negative(conditioner, given, images), conditioner.tokenize([wanted]))


def test_half_precision_files_are_computed_in_float32(bundle, tmp_path):
    pipelines.save_bundle(bundle, tmp_path, "float16")
    assert {t.dtype for t in io.open_folder(tmp_path / "transformer").values()} == {np.dtype(np.float16)}
    loaded = pipelines.load_bundle(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
    assert_same_params(loaded.params, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), bundle.params))
    assert pipelines.load_bundle(tmp_path, "bfloat16").transformer.dtype == jax.numpy.bfloat16


def test_our_own_checkpoint_reads_the_same(saved, bundle, tmp_path):
    convert.from_torch(saved, tmp_path / "native")
    assert not list((tmp_path / "native").glob("*/*.safetensors"))
    loaded = pipelines.load_bundle(tmp_path / "native")
    assert_same_params(loaded.params, bundle.params)
    assert loaded.conditioner.max_sequence_length == SIZES.settings["max_sequence_length"]


def test_t5_may_be_left_out_only_on_record(folder):
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(FileNotFoundError, match="lacks the folder text_encoder_3/"):
        pipelines.load_bundle(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    loaded = pipelines.load_bundle(folder)
    assert loaded.conditioner.t5 is None and "text_encoder_3" not in loaded.params["conditioner"]


def cut_short(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(folder):
    part = folder / "transformer"
    tensors = {name: np.asarray(t) for name, t in io.open_folder(part).items()}
    files = io.write_folder(part, io.DIFFUSERS_STEM, tensors.items(), max_shard_bytes=20_000)
    assert len(files) > 2
    files[1].unlink()


def lose_tensor(folder):
    tensors = {name: np.asarray(t) for name, t in io.open_folder(folder / "vae").items()}
    del tensors["decoder.conv_in.bias"]
    io.write_folder(folder / "vae", io.DIFFUSERS_STEM, tensors.items())


def other_shape(folder):
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def other_model(folder):
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "pooled_projection_dim": 48}))


DAMAGE = {
    "transformer/ gone": (lambda f: shutil.rmtree(f / "transformer"), "lacks the folder transformer/"),
    "config gone": (lambda f: (f / "vae" / "config.json").unlink(), "lacks vae/config.json"),
    "config broken": (lambda f: (f / "vae" / "config.json").write_text("{"), "vae/config.json is not valid JSON"),
    "config no object": (lambda f: (f / "vae" / "config.json").write_text("[]"), "must hold a JSON object"),
    "weights gone": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "vae holds no diffusion_pytorch_model.safetensors",
    ),
    "scheduler gone": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json"),
    "tokenizer gone": (lambda f: shutil.rmtree(f / "tokenizer_2"), "lacks tokenizer_2/"),
    "cut short": (cut_short, "cut short"),
    "shard gone": (lose_shard, "lacks the shard diffusion_pytorch_model-00002-of-"),
    "tensor gone": (lose_tensor, "lacks the tensor 'decoder.conv_in.bias'"),
    "other shape": (other_shape, "with shape"),
    "other model": (other_model, "pooled_projection_dim is 48 .* different models|text_embedder.* with shape"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_incomplete_folder_is_one_sentence_before_any_weight_is_read(name, folder, monkeypatch):
    damage, sentence = DAMAGE[name]
    damage(folder)
    monkeypatch.setattr(bundles.native, "load_component", lambda *a: pytest.fail("weights were read"))
    with pytest.raises((FileNotFoundError, ValueError), match=sentence) as caught:
        pipelines.load_bundle(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_model(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        pipelines.load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file, not a model folder"):
        pipelines.load(tmp_path / "file")


def test_a_hub_id(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, allow=allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert bundles.find_model("someone/some-model") == saved
    assert (asked["name"], asked["revision"]) == ("someone/some-model", None)
    # Nothing executable is fetched; a chat template (jinja) is rendered in a sandbox.
    assert {pattern.rsplit(".")[-1] for pattern in asked["allow"]} == {"json", "txt", "safetensors", "jinja"}
    bundles.find_model("someone/some-model@v2")
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v2")


def test_what_does_not_fit_a_file_is_not_written(bundle, tmp_path):
    pipelines.save_bundle(bundle, tmp_path)
    params = {**bundle.params, "vae": jax.tree.map(lambda x: x * np.float32(1e6), bundle.params["vae"])}
    with pytest.raises(ValueError, match=r"vae's .* is not finite as float16"):
        pipelines.save_bundle(bundle.replace(params=params), tmp_path, "float16")
    # The weights that were there are still whole.
    assert_same_params(pipelines.load_bundle(tmp_path).params["vae"], bundle.params["vae"])


def test_unknown_sizes_and_dtypes(saved):
    with pytest.raises(
        ValueError,
        match="size 'huge' is unknown; choose one of deepgen, sd35_medium, tiny, tiny_deepgen, tiny_metaquery, unipic2_metaquery",
    ):
        pipelines.init_bundle("huge")
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        pipelines.load_bundle(saved, "int8")
    with pytest.raises(ValueError, match=re.escape("use the tokenizer that belongs to the encoder")):
        import dataclasses

        small = dataclasses.replace(SIZES.networks["text_encoder"], vocab_size=100)
        bundles.make_modules({**SIZES.networks, "text_encoder": small}, text_tokenizers(), SIZES.settings, "float32")


@pytest.mark.slow
def test_random_weights():
    first, again, other = (pipelines.init_bundle(SIZES, seed, tokenizers=text_tokenizers()) for seed in (0, 0, 1))
    assert_same_params(first.params, again.params)
    kernel = lambda b: b.params["vae"]["decoder"]["conv_in"]["kernel"]
    assert not np.array_equal(kernel(first), kernel(other))


def test_a_model_at_an_address(saved, tmp_path, monkeypatch):
    """Read from a copy, without what could be executed; an export goes there."""
    import fsspec

    from unipic2_jax.core.addresses import uploaded

    monkeypatch.setenv("UNIPIC2_CACHE", str(tmp_path))
    store = fsspec.filesystem("memory")
    try:
        store.put(str(saved), "/bucket/model", recursive=True)
        store.pipe_file("/bucket/model/transformer/run_me.py", b"raise SystemExit")
        here, there = pipelines.load_bundle(saved), pipelines.load_bundle("memory://bucket/model")
        assert_same_params(there.params, here.params)
        assert not list(tmp_path.rglob("run_me.py"))
        with uploaded("memory://bucket/export") as folder:
            pipelines.save_bundle(there, folder)
        assert_same_params(pipelines.load_bundle("memory://bucket/export").params, here.params)
        with pytest.raises(FileNotFoundError, match=r"There is no file at memory://bucket/none; check the address\."):
            pipelines.load_bundle("memory://bucket/none")
    finally:
        store.store.clear()
