"""Checkpoints from PyTorch to here and back: the same names, shapes, dtypes and bits."""

import json
import re
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="these tests convert checkpoints that PyTorch wrote")
pytest.importorskip("diffusers", reason="these tests convert checkpoints that diffusers wrote")

import tiny_diffusers  # noqa: E402

from unipic2_jax.models import convert, registry  # noqa: E402
from unipic2_jax.models.sd3 import single_file  # noqa: E402
from unipic2_jax.weights import io, native, table, variants  # noqa: E402

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_diffusers.save(torch, tmp_path_factory.mktemp("float32"))


def contents(checkpoint):
    return {name: (str(t.dtype), t.shape, np.asarray(t).tobytes()) for name, t in checkpoint.items()}


def networks(folder):
    return {part: contents(io.open_folder(folder / part)) for part in PARTS}


def texts(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.json") if "index" not in p.name}


@pytest.mark.parametrize(("dtype", "shard"), [("float32", "20KB"), ("float16", "10GB"), ("bfloat16", "8KB")])
def test_a_folder_comes_back_bit_for_bit(tmp_path, dtype, shard):
    src = tiny_diffusers.save(torch, tmp_path / "src", dtype, shard)
    assert (src / "transformer/diffusion_pytorch_model.safetensors.index.json").exists() == (shard != "10GB")
    lines = convert.from_torch(src, tmp_path / "ours")
    assert len(lines) == 5 and not list((tmp_path / "ours").rglob("diffusion_pytorch_model*"))
    convert.to_torch(tmp_path / "ours", tmp_path / "back", max_shard_bytes=30_000)
    assert networks(src) == networks(tmp_path / "back")
    assert texts(src) == texts(tmp_path / "back")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_folders_of_the_authors_own_class_are_known(folder, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(folder, src)
    config = json.loads((src / "transformer/config.json").read_text())
    config["_class_name"] = "SD3Transformer2DKontextModel"
    (src / "transformer/config.json").write_text(json.dumps(config))
    index = json.loads((src / "model_index.json").read_text())
    index["transformer"] = ["unipicv2.transformer_sd3_kontext", config["_class_name"]]
    (src / "model_index.json").write_text(json.dumps(index))
    convert.from_torch(src, tmp_path / "ours")
    convert.to_torch(tmp_path / "ours", tmp_path / "back")
    assert networks(src) == networks(tmp_path / "back") and texts(src) == texts(tmp_path / "back")


def test_the_originals_read_what_comes_back(folder, tmp_path):
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    convert.from_torch(folder, tmp_path / "ours")
    convert.to_torch(tmp_path / "ours", tmp_path / "back", max_shard_bytes=10_000)
    classes = (SD3Transformer2DModel, AutoencoderKL, *[CLIPTextModelWithProjection] * 2, T5EncoderModel)
    for part, cls in zip(PARTS, classes):
        before, after = (cls.from_pretrained(d / part).state_dict() for d in (folder, tmp_path / "back"))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), part


def test_dtypes_that_differ_inside_a_stack_come_back(folder, tmp_path):
    dtypes = [np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)]
    source, rng = io.open_folder(folder / "transformer"), np.random.default_rng(0)
    mixed = [(name, np.asarray(t).astype(dtypes[rng.integers(3)])) for name, t in source.items()]
    io.write_folder(tmp_path / "src", io.DIFFUSERS_STEM, mixed, metadata={"format": "pt", "note": "mixed"})
    (tmp_path / "src/config.json").write_text((folder / "transformer/config.json").read_text())
    convert.from_torch(tmp_path / "src", tmp_path / "ours")
    convert.to_torch(tmp_path / "ours", tmp_path / "back")
    before, after = io.open_folder(tmp_path / "src"), io.open_folder(tmp_path / "back")
    assert contents(before) == contents(after) and before.metadata == after.metadata
    assert len({entry[0] for entry in contents(after).values()}) == 3


def test_parameters_are_the_same_from_either_folder(folder, tmp_path):
    convert.from_torch(folder / "transformer", tmp_path / "ours")
    network, config = registry.read_network(tmp_path / "ours")
    rules, abstract = network.rules(config), network.abstract(config)
    ours = table.flatten(native.load_component(tmp_path / "ours", rules, abstract, dtype="bfloat16"))
    theirs = table.flatten(native.load_component(folder / "transformer", rules, abstract, dtype="bfloat16"))
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


def test_tensors_that_no_network_uses_come_back(folder, tmp_path):
    ids = np.arange(8, dtype=np.int64)[None]
    tensors = [(name, t[...]) for name, t in io.open_folder(folder / "text_encoder").items()]
    io.write_folder(tmp_path / "src", "model", [*tensors, ("text_model.embeddings.position_ids", ids)])
    (tmp_path / "src/config.json").write_text((folder / "text_encoder/config.json").read_text())
    convert.from_torch(tmp_path / "src", tmp_path / "ours")
    convert.to_torch(tmp_path / "ours", tmp_path / "back")
    assert contents(io.open_folder(tmp_path / "src")) == contents(io.open_folder(tmp_path / "back"))


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """A single file of all five networks, as other tools leave it: no CLIP-L projection, a logit scale, a header."""
    file = tmp_path_factory.mktemp("single") / "sd35.safetensors"
    configs = {part: registry.read_network(folder / part)[1] for part in PARTS}
    sources = {part: io.open_folder(folder / part) for part in PARTS}
    joined = list(single_file.join(sources, configs, filled=["text_encoder/text_projection.weight"]))
    joined.append(("text_encoders.clip_l.logit_scale", np.float32([4.6])))
    return io.write_file(file, joined, {"modelspec.title": "tiny"})


def test_diffusers_reads_our_single_file_as_we_wrote_it(folder, single):
    from diffusers.loaders.single_file_utils import (
        convert_ldm_vae_checkpoint,
        convert_sd3_transformer_checkpoint_to_diffusers,
    )
    from safetensors.torch import load_file

    state = load_file(single)
    theirs = {
        "transformer": convert_sd3_transformer_checkpoint_to_diffusers(
            {k: v for k, v in state.items() if k.startswith("model.diffusion_model.")}
        ),
        "vae": convert_ldm_vae_checkpoint(state, json.loads((folder / "vae/config.json").read_text())),
    }
    for part, converted in theirs.items():
        original = load_file(next((folder / part).glob("*.safetensors")))
        assert original.keys() == converted.keys()
        assert all(torch.equal(original[k], converted[k]) for k in original)


def test_a_single_file_comes_back_bit_for_bit(folder, single, tmp_path):
    convert.from_torch(single, tmp_path / "ours", base=folder)
    convert.to_torch(tmp_path / "ours", tmp_path / "back.safetensors", layout="single_file")
    before, after = io.read_header(single), io.read_header(tmp_path / "back.safetensors")
    assert contents(before[0]) == contents(after[0]) and before[1] == after[1]
    convert.to_torch(tmp_path / "ours", tmp_path / "back")
    wanted, got = networks(folder), networks(tmp_path / "back")
    identity = np.eye(8, dtype=np.float32)
    wanted["text_encoder"]["text_projection.weight"] = ("float32", identity.shape, identity.tobytes())
    assert wanted == got


def test_a_single_file_alone_gives_its_sizes(folder, single, tmp_path):
    convert.from_torch(single, tmp_path / "ours")
    convert.to_torch(tmp_path / "ours", tmp_path / "back.safetensors")
    assert contents(io.read_header(single)[0]) == contents(io.read_header(tmp_path / "back.safetensors")[0])
    for part in ("transformer", "vae"):
        read, original = (registry.read_network(d / part)[1].to_dict() for d in (tmp_path / "ours", folder))
        untold = {"sample_size", "norm_num_groups"}
        assert {k: v for k, v in read.items() if k not in untold} == {
            k: v for k, v in original.items() if k not in untold
        }


def test_a_file_of_transformer_and_autoencoder_takes_the_rest_from_base(folder, tmp_path):
    configs = {part: registry.read_network(folder / part)[1] for part in PARTS[:2]}
    sources = {part: io.open_folder(folder / part) for part in PARTS[:2]}
    file = io.write_file(tmp_path / "two.safetensors", single_file.join(sources, configs))
    convert.from_torch(file, tmp_path / "ours", base=folder)
    convert.to_torch(tmp_path / "ours", tmp_path / "folder")
    assert networks(tmp_path / "folder") == networks(folder)
    convert.to_torch(tmp_path / "ours", tmp_path / "back.safetensors")
    assert contents(io.read_header(file)[0]) == contents(io.read_header(tmp_path / "back.safetensors")[0])


def rewrite(folder, out, change):
    """A copy of the transformer with `change(dict of tensors)` made to it."""
    tensors = {name: t[...] for name, t in io.open_folder(folder / "transformer").items()}
    change(tensors)
    io.write_folder(out, io.DIFFUSERS_STEM, tensors.items())
    (out / "config.json").write_text((folder / "transformer/config.json").read_text())
    return out


def renamed(tensors):
    tensors["transformer_blocks.1.attn.to_q.wieght"] = tensors.pop("transformer_blocks.1.attn.to_q.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, ["lacks", "'transformer_blocks.1.attn.to_q.weight'", "nearest", "to_q.wieght"]),
        (lambda t: t.update({"proj_out.wait": t["proj_out.bias"]}), ["proj_out.wait", "nearest", "proj_out."]),
        (
            lambda t: t.update({"proj_out.bias": np.zeros(3, np.float32)}),
            ["'proj_out.bias'", "(3,)", "(16,)", "config.json", "diffusion_pytorch_model.safetensors"],
        ),
        (lambda t: t.update({"proj_out.bias": np.zeros(16, np.int32)}), ["'proj_out.bias'", "int32"]),
    ],
)
def test_wrong_tensors_are_named_and_nothing_is_left(folder, tmp_path, change, words):
    src = rewrite(folder, tmp_path / "src", change)
    with pytest.raises(ValueError) as error:
        convert.from_torch(src, tmp_path / "ours")
    message = str(error.value)
    assert all(word in message for word in [*words, str(src)]), message
    assert message.endswith((".", ".json.")) and "\n" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_wrong_tensors_of_a_single_file_are_named(folder, single, tmp_path):
    tensors = {name: t[...] for name, t in io.read_header(single)[0].items()}
    name = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"
    io.write_file(tmp_path / "less.safetensors", ((k, v) for k, v in tensors.items() if k != name))
    with pytest.raises(ValueError, match=f"less.safetensors lacks the tensor '{name}'"):
        convert.from_torch(tmp_path / "less.safetensors", tmp_path / "ours", base=folder)
    io.write_file(tmp_path / "more.safetensors", {**tensors, name + "s": tensors[name]}.items())
    with pytest.raises(ValueError, match=r"more.safetensors holds the tensor .*qkv.weights'.*nearest: .*qkv.weight'"):
        convert.from_torch(tmp_path / "more.safetensors", tmp_path / "ours", base=folder)
    assert not (tmp_path / "ours").exists()


def test_wrong_places_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert.from_torch(tmp_path / "nowhere", tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match=r"holds no model"):
        convert.from_torch(tmp_path, tmp_path / "ours")
    with pytest.raises(ValueError, match="already holds something"):
        convert.from_torch(folder, folder)
    convert.from_torch(folder / "vae", tmp_path / "ours")
    with pytest.raises(ValueError, match="already converted"):
        convert.from_torch(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ValueError, match=r"needs --dst to be a \.safetensors file"):
        convert.to_torch(folder, tmp_path / "x", layout="single_file")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    (tmp_path / "ours/config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKx"}))
    with pytest.raises(ValueError, match=r"'AutoencoderKx' \(nearest: 'AutoencoderKL'\)"):
        convert.to_torch(tmp_path / "ours", tmp_path / "back")


WRAPPED = {
    "DeepSpeed": lambda name: f"module.{name}",
    "FSDP": lambda name: (
        "_fsdp_wrapped_module." + name.replace("transformer_blocks.1.", "transformer_blocks.1._fsdp_wrapped_module.")
    ),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "model.diffusion_model.": lambda name: f"model.diffusion_model.{name}",
    "diffusion_model.": lambda name: f"module.diffusion_model.{name}",
    "transformer.": lambda name: f"transformer.{name}",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_names_are_read_as_what_they_are(folder, tmp_path, caplog, kind):
    def wrap(tensors):
        wrapped = {WRAPPED[kind](name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(wrapped)

    src = rewrite(folder, tmp_path / "src", wrap)
    (line,) = convert.from_torch(src, tmp_path / "ours")
    assert "in the names of tensors is left out" in line
    convert.to_torch(tmp_path / "ours", tmp_path / "back")
    assert contents(io.open_folder(tmp_path / "back")) == contents(io.open_folder(folder / "transformer"))
    network, config = registry.read_network(src)
    loaded = native.load_component(src, network.rules(config), network.abstract(config))
    expected = native.load_component(folder / "transformer", network.rules(config), network.abstract(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert "is left out" in caplog.text
    # The same tensors as one file: the networks that it lacks come from the base.
    convert.from_torch(src / "diffusion_pytorch_model.safetensors", tmp_path / "whole", base=folder)
    convert.to_torch(tmp_path / "whole", tmp_path / "whole_back")
    assert networks(tmp_path / "whole_back") == networks(folder)


def test_names_that_become_the_same_are_refused(folder, tmp_path):
    src = rewrite(folder, tmp_path / "src", lambda t: t.update({"_orig_mod.proj_out.bias": t["proj_out.bias"]}))
    with pytest.raises(ValueError, match=r"Without '_orig_mod\.' in their names two tensors have the same one"):
        convert.from_torch(src, tmp_path / "ours")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "module.", ""])
def test_a_single_file_of_the_transformer_under_any_prefix(folder, tmp_path, prefix):
    config = {"transformer": registry.read_network(folder / "transformer")[1]}
    joined = single_file.join({"transformer": io.open_folder(folder / "transformer")}, config, {"transformer": prefix})
    file = io.write_file(tmp_path / "one.safetensors", joined)
    convert.from_torch(file, tmp_path / "ours", base=folder)
    convert.to_torch(tmp_path / "ours", tmp_path / "back")
    assert networks(tmp_path / "back") == networks(folder)
    convert.to_torch(tmp_path / "ours", tmp_path / "back.safetensors")
    stored = io.read_header(file)[0] if prefix != "module." else variants.plain(io.Checkpoint(file, [file]))
    assert contents(stored) == contents(io.read_header(tmp_path / "back.safetensors")[0])


E4M3, E5M2, BF16 = (np.dtype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_8_bits_are_read_into_bfloat16_exactly(folder, tmp_path, caplog, dtype):
    original = {name: t[...].astype(dtype) for name, t in io.open_folder(folder / "transformer").items()}
    src = rewrite(folder, tmp_path / "src", lambda t: t.update(original))
    (line,) = convert.from_torch(src, tmp_path / "ours")
    assert f"{len(original)} tensors of {dtype} are read into bfloat16" in line and "scales" not in line
    convert.to_torch(tmp_path / "ours", tmp_path / "back")
    back = io.open_folder(tmp_path / "back")
    assert {t.dtype for t in back.values()} == {BF16}
    for name, value in original.items():
        np.testing.assert_array_equal(back[name][...].astype(np.float32), value.astype(np.float32))
    network, config = registry.read_network(src)
    loaded = table.flatten(native.load_component(src, network.rules(config), network.abstract(config)))
    assert {leaf.dtype for leaf in loaded.values()} == {BF16} and "are read into bfloat16" in caplog.text


@pytest.mark.parametrize("layout", ["diffusers", "single_file"])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_8_bits_are_multiplied_by_their_scales(folder, tmp_path, layout, scale_name):
    """ComfyUI's two spellings: one scale for a weight, or one for each row, and what only its arithmetic needs."""
    config = {"transformer": registry.read_network(folder / "transformer")[1]}
    source = io.open_folder(folder / "transformer")
    prefix, stored = "", {name: t[...] for name, t in source.items()}
    if layout == "single_file":
        prefix, stored = "model.diffusion_model.", dict(single_file.join({"transformer": source}, config))
    written, wanted = {prefix + "scaled_fp8": np.zeros(0, E4M3)}, {}
    for number, (name, value) in enumerate(stored.items()):
        if not name.endswith(".weight") or value.ndim != 2:
            written[name] = wanted[name] = value
            continue
        rows = np.abs(value).max(axis=1, keepdims=True) if number % 2 else np.abs(value).max()
        scale = np.float32(rows / 448)
        eight = (value / scale).astype(E4M3)
        written |= {name: eight, name.removesuffix("weight") + scale_name: scale.reshape(-1)}
        written[name.removesuffix("weight") + "scale_input"] = np.float32([1.0])
        wanted[name] = (eight.astype(np.float32) * scale).astype(BF16)
    if layout == "diffusers":
        io.write_folder(tmp_path / "src", io.DIFFUSERS_STEM, written.items())
        (tmp_path / "src/config.json").write_text((folder / "transformer/config.json").read_text())
        lines = convert.from_torch(tmp_path / "src", tmp_path / "ours")
        convert.to_torch(tmp_path / "ours", tmp_path / "back")
        back = io.open_folder(tmp_path / "back")
    else:
        lines = convert.from_torch(io.write_file(tmp_path / "x.safetensors", written.items()), tmp_path / "ours")
        convert.to_torch(tmp_path / "ours", tmp_path / "back.safetensors")
        back = io.read_header(tmp_path / "back.safetensors")[0]
    assert any("are read into bfloat16, times their scales" in line for line in lines)
    assert contents(back) == {name: (str(v.dtype), v.shape, v.tobytes()) for name, v in wanted.items()}


def test_a_scale_of_blocks_is_refused(folder, tmp_path):
    def change(tensors):
        tensors["proj_out.weight"] = tensors["proj_out.weight"].astype(E4M3)
        tensors["proj_out.weight_scale"] = np.ones((2, 2), np.float32)

    with pytest.raises(ValueError, match=r"a scale of shape \(2, 2\) for 'proj_out.weight'"):
        convert.from_torch(rewrite(folder, tmp_path / "src", change), tmp_path / "ours")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin"])
def test_pickles_are_refused_with_the_reason_and_the_remedy(folder, tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text((folder / "vae/config.json").read_text())
    for src in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=rf"{name} is a pickle, which can run any code .*save_file"):
            convert.from_torch(src, tmp_path / "ours")


def test_the_commands(folder, tmp_path):
    def run(module, *flags):
        return subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True)

    done = run("convert.from_torch", f"--src={folder}/vae", f"--dst={tmp_path}/ours")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"vae: AutoencoderKL, \d+ tensors, .* MB\nwrote {tmp_path}/ours\n", done.stdout)
    done = run("convert.to_torch", f"--src={tmp_path}/ours", f"--dst={tmp_path}/back", "--max_shard_gb=1e-5")
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 2)
    assert len(list((tmp_path / "back").glob("*-of-*.safetensors"))) > 1
    assert contents(io.open_folder(folder / "vae")) == contents(io.open_folder(tmp_path / "back"))
    done = run("convert.to_torch", f"--src={tmp_path}/none", f"--dst={tmp_path}/x")
    assert done.returncode == 2 and "error: There is no folder" in done.stderr and "Traceback" not in done.stderr
