"""LoRA on a pipeline and on the command line: several at once, at a scale, taken away, merged, exported."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from unipic2_jax import pipelines
from unipic2_jax.core.assets import TINY
from unipic2_jax.models.sd3.lora import init_lora
from unipic2_jax.models.sd3.lora_writing import save_lora
from unipic2_jax.pipelines import adapters
from unipic2_jax.weights import io

OPTIONS = {"height": 48, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load(TINY)


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    """Two files of the transformer: alpha = rank = 4, and rank 2 with alpha 6."""
    folder, config = tmp_path_factory.mktemp("lora"), pipe.bundle.transformer.config
    for name, rank, alpha, seed in (("small", 4, 4.0, 1), ("strong", 2, 6.0, 2)):
        tree = init_lora(jax.random.key(seed), pipe.bundle.params["transformer"], rank)
        keys = iter(jax.random.split(jax.random.key(seed), 1000))
        tree = jax.tree.map(lambda x, keys=keys: 0.1 * jax.random.normal(next(keys), x.shape), tree)
        save_lora(folder / f"{name}.safetensors", jax.device_get(tree), alpha, config)
    return folder


def made(pipe, **options):
    return pipe(PROMPT, **OPTIONS, **options).images


def with_weights(pipe, *asked):
    """The picture with LoRAs added to the weights by hand: W + up down alpha / rank, as diffusers has it."""
    from unipic2_jax.models.sd3 import mmdit_names as mmdit
    from unipic2_jax.weights import table

    config = pipe.bundle.transformer.config
    weights = dict(table.to_torch(mmdit.rules(config), pipe.bundle.params["transformer"]))
    for file, alpha, rank, scale in asked:
        tensors = io.read_header(file)[0]
        for name in tensors:
            if name.endswith("lora_A.weight"):
                layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
                down, up = (np.asarray(tensors[name.replace("lora_A", side)][...]) for side in ("lora_A", "lora_B"))
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * alpha / rank * up @ down
    params = table.to_flax(mmdit.rules(config), weights, pipe.bundle.params["transformer"])
    return made(pipe, params={"transformer": params})


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_loaded_at_its_own_scale_and_together(pipe, files):
    plain = made(pipe)
    small, strong = files / "small.safetensors", files / "strong.safetensors"
    pipe.load_lora(small)
    assert pipe.loras == {"small": 1.0}
    alone = made(pipe)
    assert error(alone, with_weights(pipelines.Pipeline(pipe._plain), (small, 4, 4, 1.0))) < 1e-4
    assert error(alone, plain) > 1e-2
    pipe.load_lora(strong, scale=0.5, name="other")
    both = with_weights(pipelines.Pipeline(pipe._plain), (small, 4, 4, 1.0), (strong, 6, 2, 0.5))
    assert error(made(pipe), both) < 1e-4 < error(made(pipe), alone)
    pipe.unload_lora("other")
    np.testing.assert_array_equal(made(pipe), alone)
    with pytest.raises(ValueError, match="no LoRA named 'other'; loaded are: small"):
        pipe.unload_lora("other")
    pipe.unload_lora()
    np.testing.assert_array_equal(made(pipe), plain)
    assert pipe.loras == {}
    fused = pipelines.Pipeline(pipe.bundle)
    fused.load_lora(small)
    fused.fuse_lora()
    assert fused.loras == {} and error(made(fused), alone) < 1e-4
    fused.unload_lora()
    assert error(made(fused), alone) < 1e-4, "what is merged stays"


def test_what_can_only_be_merged_comes_and_goes_too(pipe, files, tmp_path):
    """A DoRA of one layer and an update of a text encoder."""
    plain, rng = made(pipe), np.random.default_rng(0)
    width = pipe.bundle.transformer.config.width
    text = pipe.bundle.conditioner.modules["text_encoder"].config.hidden_size
    layer, encoder = "transformer.transformer_blocks.0.attn.to_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    inner = pipe.bundle.conditioner.modules["text_encoder"].config.intermediate_size
    tensors = {
        f"{layer}.lora_A.weight": normal(2, width),
        f"{layer}.lora_B.weight": normal(width, 2),
        f"{layer}.lora_magnitude_vector": np.full(width, 2.0, np.float32),
        f"{encoder}.lora_down.weight": normal(2, text),
        f"{encoder}.lora_up.weight": normal(inner, 2),
    }
    file = io.write_file(tmp_path / "dora.safetensors", tensors.items(), {"format": "pt"})
    own = pipelines.Pipeline(pipe.bundle)
    own.load_lora(file)
    assert error(made(own), plain) > 1e-2
    kernel = own.bundle.params["transformer"]["dual_blocks"]["attn"]["to_q"]["kernel"][0]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 2.0, rtol=1e-5)
    changed = own.bundle.params["conditioner"]["text_encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert not np.array_equal(
        changed[0], pipe.bundle.params["conditioner"]["text_encoder"]["layers"]["mlp"]["fc1"]["kernel"][0]
    )
    own.unload_lora()
    np.testing.assert_array_equal(made(own), plain)


def test_sentences(pipe, files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no LoRA file or folder nowhere\.safetensors"):
        pipe.load_lora("nowhere.safetensors")
    with pytest.raises(ValueError, match="scale is nan"):
        pipe.load_lora(files / "small.safetensors", scale=float("nan"))
    assert adapters.parse(["a/b:0.8", "C:\\x\\y", "file.safetensors"]) == [
        adapters.Wanted("a/b", 0.8),
        adapters.Wanted("C:\\x\\y"),
        adapters.Wanted("file.safetensors"),
    ]
    with pytest.raises(ValueError, match="FILE"):
        adapters.parse([":0.5"])


def test_understanding_takes_no_lora(files):
    command = ("launch.evaluate", "--suite=shapes-vqa", f"--lora={files / 'small.safetensors'}")
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 2 and "which no LoRA of the transformer changes" in done.stderr


def run(*line):
    return subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True, check=True)


def test_the_commands(pipe, files, tmp_path):
    """A picture with a LoRA is that of the model that it was merged into, and that of the file in kohya's layout."""
    small, kohya = files / "small.safetensors", tmp_path / "kohya.safetensors"
    picture = ("--prompt=a red circle", "--steps=2", "--height=48", "--width=48", "--guidance=1")
    run("launch.generate", *picture, f"--lora={small}:0.5", f"--out={tmp_path / 'a.png'}")
    run("launch.export", f"--model={TINY}", f"--lora={small}:0.5", f"--out={tmp_path / 'merged'}")
    said = run("convert.lora", f"--src={small}", f"--base={TINY}", "--layout=kohya", f"--dst={kohya}").stdout
    assert "rank 4, scale 1" in said
    options = {**OPTIONS, "output_type": "pil"}
    drawn = lambda pipe: np.asarray(pipe(PROMPT, **options).images[0], int)
    moved, own = np.asarray(Image.open(tmp_path / "a.png"), int), pipelines.Pipeline(pipe.bundle)
    plain = drawn(own)
    own.load_lora(kohya, scale=0.5)
    assert np.abs(moved - drawn(own)).max() <= 1 and np.abs(moved - plain).max() > 5
    assert np.abs(moved - drawn(pipelines.load(tmp_path / "merged"))).max() <= 1
    # What no LoRA changes is copied bit for bit, in the files' own dtypes.
    name = "diffusion_pytorch_model.safetensors"
    before, after = (io.read_header(f"{folder}/transformer/{name}")[0] for folder in (TINY, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key][...].tobytes() != after[key][...].tobytes()}
    assert changed and all(".attn." in key and key.endswith(".weight") for key in changed)
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert (tmp_path / "merged" / "model_index.json").is_file()
