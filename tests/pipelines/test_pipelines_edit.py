"""Editing: against a PyTorch loop over diffusers' own networks, and what people hand in as pictures."""

import io

import numpy as np
import pytest
from PIL import Image
from pipelines_common import small_bundle

from unipic2_jax.pictures import resize as pictures
from unipic2_jax.pictures.decode import read_image, to_pil
from unipic2_jax.pipelines import Pipeline, save_bundle

PROMPTS = ["make the circle green", "remove the square"]
NEGATIVE = "a black triangle"
STEPS, GUIDANCE = 10, 3.5


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(small_bundle())


def picture(seed, width=24, height=24):
    """Smooth, so that resizing is well-conditioned."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def noise(count=2):
    return np.random.default_rng(0).standard_normal((count, 16, 6, 6)).astype(np.float32)


def psnr(a, b):
    return -10 * np.log10(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))


def reference_edit(theirs, prompts, references, latents):
    """Images [N, H, W, 3] in [0, 1] of UniPic 2's editing: clean latents of the references in front of the target."""
    import torch
    from kontext_reference import kontext_forward

    with torch.no_grad():
        text, no_text, pooled, no_pooled = theirs.encode_prompt(
            prompts, None, None, negative_prompt=[NEGATIVE] * len(prompts), max_sequence_length=12
        )
        context, pooled = torch.cat([no_text, text]), torch.cat([no_pooled, pooled])
        vae, encoded = theirs.vae, []
        for images in references:
            pixels = theirs.image_processor.preprocess(images)
            mode = vae.encode(pixels).latent_dist.mode()
            encoded.append((mode - vae.config.shift_factor) * vae.config.scaling_factor)
        theirs.scheduler.set_timesteps(STEPS)
        x = torch.from_numpy(latents)
        for t in theirs.scheduler.timesteps:
            both = [torch.cat([z, z]) for z in encoded]
            velocity = kontext_forward(
                theirs.transformer, torch.cat([x, x]), t.expand(2 * len(x)), context, pooled, both
            )
            uncond, cond = velocity.chunk(2)
            x = theirs.scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, return_dict=False)[0]
        decoded = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        return theirs.image_processor.postprocess(decoded, output_type="np")


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_edit_as_the_reference(count, pipe, tmp_path):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    save_bundle(pipe.bundle, tmp_path)
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    references = [[picture(2 * r), picture(2 * r + 1)] for r in range(count)]
    wanted = reference_edit(theirs, PROMPTS, references, noise())
    options = {
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "latents": noise(),
        "output_type": "np",
        "reference_mode": "mode",
    }
    image = references[0] if count == 1 else list(map(list, zip(*references)))
    ours = pipe(PROMPTS, image, **options).images
    assert wanted.std() > 0.1 and ((wanted > 0) & (wanted < 1)).mean() > 0.5
    print(f"{count} reference(s): PSNR {psnr(ours, wanted):.1f} dB")
    assert psnr(ours, wanted) >= 50
    # The reference matters: with the pictures exchanged the edit is another one.
    assert psnr(pipe(PROMPTS, image[::-1], **options).images, wanted) < 40


def test_prompts_with_and_without_references_in_one_batch(pipe):
    options = {"num_inference_steps": STEPS, "latents": noise(3), "output_type": "latent", "reference_mode": "mode"}
    prompts = [*PROMPTS, "two green crosses"]
    mixed = pipe(prompts, [picture(0), [picture(1), picture(2)], None], **options).images
    for i, image in enumerate([[picture(0)], [[picture(1), picture(2)]], None]):
        alone = pipe(prompts[i], image, **{**options, "latents": noise(3)[i : i + 1]}).images
        np.testing.assert_allclose(mixed[i : i + 1], alone, atol=2e-3)


def test_samples_of_the_reference_follow_the_seed(pipe):
    options = {"num_inference_steps": STEPS, "output_type": "latent", "latents": noise(2)}
    sampled = pipe(PROMPTS, picture(0), seed=3, **options).images
    np.testing.assert_array_equal(pipe(PROMPTS, picture(0), seed=3, **options).images, sampled)
    assert np.abs(pipe(PROMPTS, picture(0), seed=4, **options).images - sampled).max() > 1e-3


def test_pictures_of_other_sizes(pipe):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0}
    wide, tall = picture(0, 90, 60), picture(1, 30, 60)
    made = pipe(PROMPTS, [wide, tall], **options).images
    # The longer edge becomes the model's 24 pixels, the shorter the nearest multiple of 8.
    assert [image.size for image in made] == [(24, 16), (16, 24)]
    with pytest.raises(ValueError, match="different sizes, which output_type 'np' cannot stack"):
        pipe(PROMPTS, [wide, tall], output_type="np", **options)
    assert pipe(PROMPTS[0], wide, height=24, **options).images[0].size == (24, 24)
    # A reference of its own shape is padded and masked, and is not the resized one.
    square = {"height": 24, "width": 24, "output_type": "latent", "latents": noise(1), **options}
    kept = pipe(PROMPTS[0], [[wide, tall]], resize_references=False, **square).images
    assert np.abs(kept - pipe(PROMPTS[0], [[wide, tall]], **square).images).max() > 1e-3


def test_sizes_of_the_full_model():
    assert pictures.fit_longer_edge((300, 400), 512, 16) == (384, 512)
    assert pictures.fit_longer_edge((1080, 1920), 512, 16) == (288, 512)
    assert pictures.fit_longer_edge((20, 2000), 512, 16) == (32, 512)
    # 48 is no multiple of 32, so the tiny model rounds to its own patch.
    assert pictures.fit_longer_edge((44, 48), 48, 16) == (48, 48)
    assert pictures.fit_longer_edge((30, 48), 48, 16) == (32, 48)


def test_every_kind_of_picture_becomes_upright_rgb():
    rgb = picture(0, 20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    stored = io.BytesIO()
    rgb.save(stored, "PNG", exif=exif)
    turned = to_pil(Image.open(stored))
    assert turned.size == (10, 20)
    np.testing.assert_array_equal(turned, rgb.transpose(Image.Transpose.ROTATE_270))
    clear = rgb.copy()
    clear.putalpha(0)
    assert np.asarray(to_pil(clear)).min() == 255
    for mode in ("L", "LA", "P", "1", "CMYK", "I;16", "F", "RGBA"):
        source = rgb.convert("L").convert(mode) if mode in ("I;16", "F") else rgb.convert(mode)
        out = to_pil(source)
        assert out.mode == "RGB" and out.size == rgb.size
        if mode != "1":
            assert np.asarray(out, float).std() > 5, mode
    sixteen = Image.fromarray(np.asarray(rgb.convert("L"), np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(to_pil(sixteen))[..., 0], rgb.convert("L"))
    array = np.asarray(rgb)
    for same in (array, array.astype(np.float32) / 255, np.dstack([array, np.full((10, 20), 255, np.uint8)])):
        np.testing.assert_array_equal(to_pil(same), array)
    np.testing.assert_allclose(pictures.to_model([rgb], 10, 20)[0], array / 127.5 - 1, atol=1e-6)


BAD_IMAGES = {
    "shape": (np.zeros((8, 8, 2), np.uint8), r"must have the shape \[H, W, 3\]"),
    "empty": (np.zeros((0, 8, 3), np.uint8), r"must have the shape"),
    "integers": (np.zeros((8, 8, 3), np.int32), "must be uint8 .* or float .*, not int32"),
    "range": (np.full((24, 24, 3), 200.0), r"must lie in 0\.\.1, but this one spans 200\.\.200"),
    "nan": (np.full((24, 24, 3), np.nan), "NaN or infinite"),
    "small": (picture(0, 24, 7), "24 x 7 pixels is smaller than one patch of 8 pixels"),
    "missing": ("no/such.png", "There is no image file 'no/such.png'"),
    "two for one": ([picture(0), picture(1)], r"2 entries for 1 prompt; .* \[\[a, b\]\]"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_picture_is_one_sentence_before_any_compute(name, pipe, monkeypatch):
    image, sentence = BAD_IMAGES[name]
    monkeypatch.setattr(pipe, "_make", lambda *a: pytest.fail("something was computed"))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        pipe(PROMPTS[0], image)
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path):
    good = io.BytesIO()
    picture(0, 200, 200).save(good, "PNG")
    files = {"cut.png": good.getvalue()[:200], "text.png": b"this is no picture", "empty.jpg": b""}
    broken = bytearray(good.getvalue())
    broken[60:80] = bytes(20)
    files["broken.png"] = bytes(broken)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"(cannot be decoded|is empty) .*; replace") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
