"""Text to image: against diffusers' own pipeline, and the words of a call."""

import jax
import numpy as np
import pytest
from PIL import Image
from pipelines_common import small_bundle

from unipic2_jax.pipelines import Pipeline, save_bundle

PROMPTS = ["a red circle left of a blue square", "two green crosses"]
NEGATIVES = ["a black triangle", ""]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(small_bundle())


def noise(count=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 16, 6, 6)).astype(np.float32)


def psnr(a, b):
    return -10 * np.log10(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))


def test_the_same_picture_as_diffusers(pipe, tmp_path):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    save_bundle(pipe.bundle, tmp_path)
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 3.5, "negative_prompt": NEGATIVES, "output_type": "np"}
    wanted = theirs(
        PROMPTS, latents=torch.from_numpy(noise()), height=24, width=24, max_sequence_length=12, **options
    ).images
    ours = pipe(PROMPTS, latents=noise(), **options).images
    assert ours.shape == wanted.shape == (2, 24, 24, 3)
    # The picture must be one, and guidance, text and noise must matter for the comparison to mean something.
    assert wanted.std() > 0.1 and ((wanted > 0) & (wanted < 1)).mean() > 0.5
    assert psnr(wanted[0], wanted[1]) < 20
    print(f"PSNR {psnr(ours, wanted):.1f} dB")
    assert psnr(ours, wanted) >= 50
    unlike = theirs(
        PROMPTS, latents=torch.from_numpy(noise()), height=24, width=24, max_sequence_length=12,
        **{**options, "negative_prompt": ["", ""]},
    ).images  # fmt: skip
    assert psnr(ours[0], unlike[0]) < 45


def test_a_seed_is_a_picture(pipe):
    options = {"num_inference_steps": 10, "output_type": "np"}
    both = pipe(PROMPTS, seed=7, **options).images
    np.testing.assert_array_equal(pipe(PROMPTS, seed=7, **options).images, both)
    # Whatever the neighbours: the second picture of this call has the seed 8.
    swapped = pipe(PROMPTS[::-1], seed=[8, 7], **options).images
    np.testing.assert_allclose(swapped[::-1], both, atol=1e-5)
    assert np.abs(pipe(PROMPTS, seed=8, **options).images - both).max() > 0.05
    # Of any size and sign, modulo 2**32, as everywhere.
    np.testing.assert_array_equal(pipe(PROMPTS, seed=7 - 2**32, **options).images, both)


def test_batches_outputs_and_callbacks(pipe):
    seen = {}
    options = {"num_inference_steps": 10, "num_images_per_prompt": 2, "guidance_scale": 3.5}
    made = pipe(PROMPTS[:1] * 2, **options, batch_size=2, on_image=seen.__setitem__).images
    assert [type(image) for image in made] == [Image.Image] * 4 and made[0].size == (24, 24)
    assert seen == dict(enumerate(made))
    # One prompt twice, two pictures each: four seeds, four pictures.
    assert len({image.tobytes() for image in made}) == 4
    short = pipe(PROMPTS[:1], seed=[0, 1], **options, batch_size=2, output_type="np").images
    # The last batch of one picture is filled up and cut again.
    three = pipe([PROMPTS[0]] * 3, num_inference_steps=10, batch_size=2, output_type="np").images
    np.testing.assert_allclose(three[:2], short, atol=1e-5)
    assert np.abs((three[2] * 255).round() - np.asarray(made[2])).max() <= 1
    latents = pipe(PROMPTS, num_inference_steps=10, output_type="latent").images
    assert latents.shape == (2, 16, 6, 6) and np.isfinite(latents).all()


def test_other_parameters_and_lora(pipe):
    from unipic2_jax.models.sd3.lora import init_lora

    options = {"num_inference_steps": 10, "output_type": "latent"}
    base = pipe(PROMPTS, **options).images
    transformer = pipe.bundle.params["transformer"]
    lora = init_lora(jax.random.key(0), transformer, 2)
    np.testing.assert_allclose(pipe(PROMPTS, **options, lora=lora).images, base, atol=1e-4)
    moved = jax.tree.map(lambda x: x + 0.1, lora)
    assert np.abs(pipe(PROMPTS, **options, lora=moved).images - base).max() > 0.01
    halved = jax.tree.map(lambda x: x * 0.5, transformer)
    assert np.abs(pipe(PROMPTS, **options, params={"transformer": halved}).images - base).max() > 0.01
    broken = jax.tree.map(lambda x: x * np.nan, transformer)
    with pytest.raises(ValueError, match="NaN or infinite values for the prompt 'a red circle left"):
        pipe(PROMPTS, **options, params={"transformer": broken})


BAD = {
    "no prompt": ({"prompt": []}, "There is no prompt"),
    "height": ({"height": 30}, "height 30 is not a multiple of the model's patch of 8 pixels; use 32"),
    "zero": ({"width": 0, "height": 24}, "width 0 is not a multiple .* use 8"),
    "too large": ({"height": 128, "width": 8}, "exceeds the model's position table, which ends at 64"),
    "steps": ({"num_inference_steps": 0}, "at least 1 step"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    "count": ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    "output": ({"output_type": "jpeg"}, "output_type 'jpeg' is unknown; choose one of 'pil', 'np', 'latent'"),
    "negative": (
        {"negative_prompt": "a", "guidance_scale": 1.0},
        "negative_prompt changes nothing at guidance_scale 1",
    ),
    "negatives": ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 entries for 2 prompts"),
    "half a character": ({"prompt": ["a", "b \ud83d"]}, r"half a character in prompt \(the lone surrogate U\+D83D"),
    "half a negative": ({"negative_prompt": "b \ud83d"}, "half a character in negative_prompt"),
    "seeds": ({"seed": [1, 2, 3]}, "3 seeds for 2 pictures"),
    "latents": ({"latents": np.zeros((2, 4, 6, 6))}, r"latents must have the shape \[2, 16, any, any\]"),
    "latents size": ({"latents": np.zeros((2, 16, 6, 6)), "height": 32}, r"\[2, 16, 8, any\]"),
    "latents nan": ({"latents": np.full((2, 16, 6, 6), np.nan)}, "NaN or infinite"),
    "image count": ({"image": [np.zeros((24, 24, 3), np.uint8)]}, "image holds 1 entries for 2 prompts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_before_any_compute(name, pipe, monkeypatch):
    changed, sentence = BAD[name]
    monkeypatch.setattr(pipe, "_make", lambda *a: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=sentence) as caught:
        pipe(**{"prompt": PROMPTS, **changed})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prompt": [3]}, "A prompt must be a string but one is int"),
        ({"prompt": None}, "prompt is None; it must be a string"),
        ({"negative_prompt": 5}, "negative_prompt is 5; it must be a string"),
        ({"seed": None}, "A seed is None; seed must be a whole number"),
        ({"seed": 1.5}, r"A seed is 1\.5; seed must be"),
        ({"seed": [1, 2.5]}, r"A seed is 2\.5; seed must be"),
        ({"seed": True}, "A seed is True; seed must be"),
        ({"seed": "12"}, "A seed is '12'; seed must be"),
    ],
)
def test_what_is_of_the_wrong_type_is_named(changed, sentence, pipe):
    with pytest.raises(TypeError, match=sentence):
        pipe(**{"prompt": PROMPTS, **changed})
