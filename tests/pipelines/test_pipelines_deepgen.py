"""DeepGen as a whole model: the pipeline against PyTorch, its folder, conversion, and the commands."""

import dataclasses
import json
import shutil

import deepgen_reference as theirs
import jax
import numpy as np
import pytest
from deepgen_reference import LORA, SMALL, VLM
from PIL import Image
from pipelines_common import SIZES as TEXT_SIZES
from pipelines_common import small_bundle
from qwen_reference import processor

from unipic2_jax.models import convert
from unipic2_jax.models.bundle import load_bundle, save_bundle
from unipic2_jax.models.qwen import names as qwen_names
from unipic2_jax.models.registry import family_of_folder
from unipic2_jax.pipelines.pipeline import Pipeline
from unipic2_jax.weights import io

PROMPTS = ["a red square", "make both of them blue, please"]
NEGATIVES = ["", "blurry, low quality"]
STEPS, GUIDANCE = 10, 4.0
DRAWN = {name: TEXT_SIZES.networks[name] for name in ("transformer", "vae")}
CONNECTOR = dataclasses.replace(SMALL, joint_attention_dim=32, pooled_projection_dim=32)
SIZES = dataclasses.replace(
    TEXT_SIZES,
    family="deepgen",
    networks={**DRAWN, "conditioner": CONNECTOR, "vlm": VLM, "lora": LORA},
    settings={"vision_scale": 1.0, "edit_negative": "blurry, low quality"},
)
PROCESSOR = processor(VLM)


def picture(seed, width=24, height=24):
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def noise(count=2):
    return np.random.default_rng(0).standard_normal((count, 16, 6, 6)).astype(np.float32)


def psnr(a, b):
    return -10 * np.log10(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))


@pytest.fixture(scope="module")
def made():
    return small_bundle(SIZES, tokenizers=PROCESSOR)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    return save_bundle(made, tmp_path_factory.mktemp("deepgen") / "model")


@pytest.fixture(scope="module")
def torch_models(folder):
    """(language model with its adapter, connector, transformer, VAE, schedule) with the weights of `folder`."""
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    pytest.importorskip("peft", reason="the language model's LoRA is peft's")
    vlm, head = theirs.language_model(torch, LORA), theirs.randomised(theirs.connector(CONNECTOR, torch), torch)
    read = lambda part: {k: torch.from_numpy(np.array(v)) for k, v in io.open_folder(folder / part).items()}
    head.load_state_dict(read("conditioner"))
    own = {**read("vlm"), **read("lora")}
    aliases = {a: n for r in qwen_names.rules(VLM) for a, n in r.alias_names()}
    plain = lambda name: name.replace(".base_layer.", ".").replace(".default.", ".")
    stored = lambda name: own[aliases.get(plain(name), plain(name))]
    vlm.load_state_dict({name: stored(name) for name in vlm.state_dict()})
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    schedule = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return torch, vlm, head, transformer, vae, schedule


def reference_pictures(models, prompts, negatives, rows, length, latents):
    """Pictures [N, H, W, 3] in [0, 1] as the original makes them, the references' mode in the place of a sample."""
    torch, vlm, head, transformer, vae, schedule = models
    pixels = [[torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in row] for row in rows]
    with torch.no_grad():
        texts = [*prompts, *negatives]
        context, pooled = theirs.condition(vlm, head, PROCESSOR, texts, pixels * 2, torch, length, scale=1.0)
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        encode = lambda p: (vae.encode(p[None]).latent_dist.mode()[0] - shift) * scale
        out = []
        for k in range(len(prompts)):
            references = [encode(p) for p in pixels[k]]
            schedule.set_timesteps(STEPS)
            x, pair = torch.from_numpy(latents[k : k + 1]), [k, len(prompts) + k]
            for t in schedule.timesteps:
                found = theirs.velocity(
                    transformer, torch.cat([x, x]), t.expand(2), context[pair], pooled[pair], references
                )
                cond, uncond = found.chunk(2)
                x = schedule.step(uncond + GUIDANCE * (cond - uncond), t, x, return_dict=False)[0]
            out.append(vae.decode(x / scale + shift).sample[0])
        return ((torch.stack(out) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()


ROWS = {"t2i": [[], []], "edit": [[picture(0)], [picture(1, 24, 16), picture(2, 16, 24)]]}


@pytest.mark.parametrize("task", ROWS)
def test_the_same_pictures_as_the_original(task, folder, torch_models):
    pipe, rows = Pipeline(load_bundle(folder)), ROWS[task]
    images = [*rows, *rows]
    length = pipe.bundle.conditioner.tokenize([*PROMPTS, *NEGATIVES], images).input_ids.shape[1]
    wanted = reference_pictures(torch_models, PROMPTS, NEGATIVES, rows, length, noise())
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise(), "output_type": "np"}
    options |= {"negative_prompt": NEGATIVES, "reference_mode": "mode", "resize_references": False}
    ours = pipe(PROMPTS, None if task == "t2i" else [list(row) for row in rows], **options).images
    assert wanted.std() > 0.1 and ((wanted > 0) & (wanted < 1)).mean() > 0.5
    print(f"{task}: PSNR {psnr(ours, wanted):.1f} dB")
    assert psnr(ours, wanted) >= 50
    if task == "edit":
        # Squeezed to the target's size, the references are others.
        squeezed = pipe(PROMPTS, [list(row) for row in rows], **{**options, "resize_references": True}).images
        assert psnr(squeezed[0], wanted[0]) >= 50 > 40 > psnr(squeezed[1], wanted[1])


def test_prompts_read_apart_and_together_can_share_a_batch(folder):
    pipe = Pipeline(load_bundle(folder))
    options = {"num_inference_steps": 1, "height": 24, "width": 24, "output_type": "np"}
    long = "a very long prompt, much longer than the others, about a red square and a blue circle"
    made = pipe(["a", "b", long], batch_size=1, **options).images
    assert made.shape == (3, 24, 24, 3) and np.isfinite(made).all()


def test_the_folder_is_of_its_family_and_is_read_back(folder, made):
    assert {p.name for p in folder.iterdir()} == {
        "transformer", "vae", "conditioner", "vlm", "lora", "scheduler", "unipic2.json", "model_index.json"
    }  # fmt: skip
    assert family_of_folder(folder).name == "deepgen"
    loaded = load_bundle(folder)
    assert loaded.conditioner.lora.config == LORA and loaded.conditioner.connector.config == CONNECTOR
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(made.params), strict=True):
        np.testing.assert_array_equal(a, b)
    settings = json.loads((folder / "unipic2.json").read_text())
    assert settings["positions"] == "mrope" and settings["reads"] == "all"


def test_a_model_may_lack_the_lora(made, tmp_path):
    conditioner = dataclasses.replace(made.conditioner, lora=None)
    params = {k: v for k, v in made.params["conditioner"].items() if k != "lora"}
    frozen = made.replace(conditioner=conditioner, params={**made.params, "conditioner": params})
    folder = save_bundle(frozen, tmp_path / "model")
    assert not (folder / "lora").exists()
    loaded = load_bundle(folder)
    assert loaded.conditioner.lora is None and loaded.family.name == "deepgen"
    # What model_index.json names has to be there.
    whole = save_bundle(made, tmp_path / "whole")
    shutil.rmtree(whole / "lora")
    with pytest.raises(FileNotFoundError, match="lacks the folder lora/"):
        load_bundle(whole)


def test_conversion_keeps_names_and_bits(folder, made, tmp_path):
    convert.from_torch(folder, tmp_path / "native")
    convert.to_torch(tmp_path / "native", tmp_path / "back")
    for part in ("conditioner", "vlm", "lora", "transformer", "vae"):
        before, after = (io.open_folder(base / part) for base in (folder, tmp_path / "back"))
        assert set(before) == set(after)
        assert all(np.array_equal(np.asarray(before[k]), np.asarray(after[k])) for k in before)
    native = load_bundle(tmp_path / "native")
    for a, b in zip(jax.tree.leaves(native.params), jax.tree.leaves(made.params), strict=True):
        np.testing.assert_array_equal(a, b)


UPDATE = "lmm.model.language_model.embed_tokens.lora_embedding_{}.default"


def as_trained(folder, whole, rng):
    """The tensors of a model folder as the original's training code names them, and others that it has."""
    found, names_of = {}, lambda part: io.open_folder(folder / part)
    found |= {f"module.transformer.{k}": np.asarray(v) for k, v in names_of("transformer").items()}
    found |= {f"module.{k}": np.asarray(v) for k, v in names_of("conditioner").items()}
    found |= {f"module.lmm.{k[:-7]}.default.weight": np.asarray(v) for k, v in names_of("lora").items()}
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    found["module." + UPDATE.format("A")] = draw(LORA.r, VLM.vocab_size)
    found["module." + UPDATE.format("B")] = draw(VLM.hidden_size, LORA.r)
    tower = "module.lmm.model.visual.blocks.0.attn.qkv.lora_{}.default.weight"
    found |= {tower.format("A"): draw(LORA.r, 32), tower.format("B"): np.zeros((96, LORA.r), np.float32)}
    if whole:
        for name, tensor in names_of("vlm").items():
            newer = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
            newer = newer.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else newer
            adapted = (
                any(part in newer for part in ("_proj.weight", "embed_tokens.weight")) and "language_model" in newer
            )
            stem, kind = newer.rsplit(".", 1)
            found[f"module.lmm.{stem}.base_layer.{kind}" if adapted else f"module.lmm.{newer}"] = np.asarray(tensor)
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["trained", "whole"])
def test_the_file_of_the_training_code_and_back(folder, made, whole, tmp_path):
    tensors = as_trained(folder, whole, np.random.default_rng(0))
    io.write_file(tmp_path / "model.safetensors", tensors.items(), {"format": "pt"})
    base = tmp_path / "base"
    # The small model's own sizes: the released ones are known without these two.
    for part in ("conditioner", "lora"):
        (base / part).mkdir(parents=True)
        shutil.copyfile(folder / part / "config.json", base / part / "config.json")
    for part in ("transformer", "vae", "vlm", "scheduler", "unipic2.json"):
        (base / part).symlink_to(folder / part)
    convert.from_torch(tmp_path / "model.safetensors", tmp_path / "native", base)
    loaded = load_bundle(tmp_path / "native")
    a, b = (tensors["module." + UPDATE.format(side)] for side in "AB")
    wanted = jax.tree.map(np.asarray, made.params)
    table = wanted["conditioner"]["vlm"]["embed_tokens"]
    table["embedding"] = table["embedding"] + (b @ a).T * LORA.lora_alpha / LORA.r
    for found, want in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
    convert.to_torch(tmp_path / "native", tmp_path / "back.safetensors")
    back = io.Checkpoint(tmp_path, [tmp_path / "back.safetensors"])
    assert set(back) == set(tensors) and back.metadata["format"] == "pt"
    assert all(np.array_equal(np.asarray(back[name]), tensors[name]) for name in tensors)


def test_files_that_cannot_be_placed_say_why(folder, tmp_path):
    tensors = as_trained(folder, False, np.random.default_rng(0))
    file = tmp_path / "model.safetensors"
    io.write_file(file, tensors.items())
    with pytest.raises(FileNotFoundError, match="needs a --base with transformer/config"):
        convert.from_torch(file, tmp_path / "native")
    tower = next(name for name in tensors if "visual" in name and "lora_B" in name)
    io.write_file(file, {**tensors, tower: tensors[tower] + 1}.items())
    with pytest.raises(ValueError, match=r"holds the update .*visual.*which is not zero"):
        convert.from_torch(file, tmp_path / "native", folder)


def test_a_model_of_ones_own_becomes_such_a_file(folder, tmp_path):
    convert.to_torch(folder, tmp_path / "model.safetensors")
    convert.from_torch(tmp_path / "model.safetensors", tmp_path / "native", folder)
    for a, b in zip(*(jax.tree.leaves(load_bundle(at).params) for at in (folder, tmp_path / "native")), strict=True):
        np.testing.assert_array_equal(a, b)
