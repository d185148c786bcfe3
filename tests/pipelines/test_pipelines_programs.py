"""What a pipeline compiles and keeps on the device: counts of prompts and steps, solvers, guidance in an interval, residence."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from pipelines_common import small_bundle

from unipic2_jax import pipelines
from unipic2_jax.pipelines import Pipeline

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red circle", "two green crosses", "a blue square", "a red cross", "a black triangle"]
OPTIONS = {"num_inference_steps": 6, "output_type": "np"}
SOURCE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(small_bundle())


@contextlib.contextmanager
def compilations():
    """The names of the events in which XLA was asked for a program, from the persistent cache or not."""
    seen = []
    listen = lambda event, _, **kwargs: seen.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("edit", [False, True])
def test_another_number_of_prompts_or_steps_compiles_nothing(pipe, edit):
    def make(count, steps=6, **options):
        image = SOURCE if edit else None
        return pipe(PROMPTS[:count], image=image, num_inference_steps=steps, output_type="np", **options).images

    with compilations() as first:
        four = make(4)
    assert first, "the events have another name"
    with compilations() as later:
        three = make(3)
        longer = [make(3, steps) for steps in (10, 28)]
        make(4, 7, progress=True)
        make(4, 9, negative_prompt="a green square")
        make(3, batch_size=4)
        make(4, 6, guidance_scale=2.0)
    assert later == []
    # Pictures do not depend on what fills up the batch, nor on where it ends.
    np.testing.assert_array_equal(three, four[:3])
    assert np.abs(longer[0] - three).max() > 1e-3
    with compilations() as more:
        make(4, 65)
    assert more, "longer tables are another program, or this test shows nothing"


def test_the_most_pictures_at_a_time_are_not_exceeded(pipe):
    decode, counts = pipe._decode, []
    try:
        pipe._decode = lambda params, latents, **how: counts.append(len(latents)) or decode(params, latents, **how)
        for count, most in ((3, 3), (5, 6), (5, None), (5, 3)):
            pipe(PROMPTS[:count], **{**OPTIONS, "num_inference_steps": 1}, batch_size=most)
    finally:
        pipe._decode = decode
    assert counts == [3, 6, 8, 3, 3]


@pytest.mark.parametrize("solver", ["euler", "dpm2", "unipc"])
def test_guidance_in_the_whole_interval_is_plain_guidance(pipe, solver):
    plain = pipe(PROMPTS[:2], **OPTIONS, solver=solver).images
    whole = pipe(PROMPTS[:2], **OPTIONS, solver=solver, guidance_interval=(0.0, 1.0)).images
    np.testing.assert_array_equal(whole, plain)
    # In no step: the conditional velocity alone.
    never = pipe(PROMPTS[:2], **OPTIONS, solver=solver, guidance_interval=(0.0, 0.0)).images
    np.testing.assert_allclose(never, pipe(PROMPTS[:2], **OPTIONS, solver=solver, guidance_scale=1).images, atol=1e-5)
    assert np.abs(never - plain).max() > 1e-2


def test_outside_of_the_interval_the_unconditional_branch_is_not_computed(pipe):
    denoise, asked = pipe._denoise, []
    sigmas = pipe.bundle.scheduler.sigmas(6)

    def spy(params, state, steps, first, last, conditioning, unconditional, *rest, **named):
        asked.append((int(first), int(last), unconditional is not None))
        return denoise(params, state, steps, first, last, conditioning, unconditional, *rest, **named)

    try:
        pipe._denoise = spy
        part = pipe(PROMPTS[:2], **OPTIONS, guidance_interval=(float(sigmas[4]), float(sigmas[1]))).images
    finally:
        pipe._denoise = denoise
    assert asked == [(0, 1, False), (1, 5, True), (5, 6, False)]
    # Training's evaluations take the same steps, in one program.
    bundle, tokenize = pipe.bundle, pipe.bundle.conditioner.tokenize
    from unipic2_jax.models import sampling
    from unipic2_jax.pictures.resize import to_unit

    keys = sampling.image_keys([0, 1])
    images = jax.jit(
        lambda params: sampling.sample_images(
            bundle, params, tokenize(PROMPTS[:2]), sampling.initial_noise(keys, (6, 6, 16)), sigmas,
            negative_tokens=tokenize([""]), guidance_scale=3.5,
            guidance_interval=(float(sigmas[4]), float(sigmas[1])),
        )
    )(bundle.params)  # fmt: skip
    np.testing.assert_allclose(to_unit(images), part, atol=1e-4)


def test_every_solver_comes_to_the_same_picture(pipe):
    latents = lambda solver, steps: (
        pipe(
            PROMPTS[:2], num_inference_steps=steps, output_type="latent", solver=solver, guidance_scale=1, seed=3
        ).images
    )
    fine = latents("euler", 500)
    for solver in ("euler", "dpm2", "unipc"):
        coarse, finer = (np.abs(latents(solver, steps) - fine).mean() for steps in (10, 40))
        assert finer < 0.6 * coarse < 0.2, (solver, coarse, finer)


def test_wrong_solver_and_interval_are_one_sentence(pipe):
    for options, message in (
        ({"solver": "heun"}, "solver 'heun' is unknown; choose one of 'euler', 'dpm2', 'unipc'"),
        ({"guidance_interval": (0.9, 0.2)}, "give two noise levels, 0 <= low <= high <= 1"),
        ({"guidance_interval": (0.2, 0.9), "guidance_scale": 1}, "guidance_interval changes nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a red circle", **options)
    with pytest.raises(ValueError, match="resident is 'vae'; choose one of 'all', 'transformer'"):
        Pipeline(pipe.bundle, resident="vae")


def held(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)}


@pytest.mark.parametrize("edit", [False, True])
def test_encoders_that_are_not_resident_leave_the_device(edit):
    bundle = small_bundle()
    params = jax.tree.map(lambda x: jax.device_put(x), bundle.params)
    sizes = {part: sum(x.nbytes for x in jax.tree.leaves(tree)) for part, tree in params.items()}
    image = SOURCE if edit else None
    options = {"image": image, **OPTIONS, "num_images_per_prompt": 2, "batch_size": 2}
    wanted = Pipeline(bundle.replace(params=params))(PROMPTS[:2], **options).images
    before = sum(x.nbytes for x in jax.live_arrays())
    pipe = Pipeline(bundle.replace(params=params), resident="transformer")
    del params
    gone = sizes["conditioner"] + sizes["vae"]
    assert sum(x.nbytes for x in jax.live_arrays()) == before - gone
    live, denoise, encode = [], pipe._denoise, pipe._encode_text

    def during(*arguments, **named):
        live.append(sum(x.nbytes for x in jax.live_arrays()))
        return denoise(*arguments, **named)

    encoded = []
    pipe._denoise, pipe._encode_text = during, lambda *given: encoded.append(1) or encode(*given)
    np.testing.assert_array_equal(pipe(PROMPTS[:2], **options).images, wanted)
    # All texts were read before the first picture, and what was read with is not there while one is made.
    assert len(live) == 2 and len(encoded) == 2
    assert max(live) < before - gone + min(sizes["conditioner"], sizes["vae"])
    assert sum(x.nbytes for x in jax.live_arrays()) <= before - gone + 4096
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(pipe.bundle.params["conditioner"]))


def test_the_dtype_follows_the_device(monkeypatch):
    assert pipelines.inference_dtype(None) == "float32" and pipelines.inference_dtype("float16") == "float16"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert pipelines.inference_dtype(None) == "bfloat16" and pipelines.inference_dtype("float32") == "float32"
    asked, bundle = [], small_bundle()
    monkeypatch.setattr(pipelines, "load_bundle", lambda source, dtype, *rest: asked.append(dtype) or bundle)
    pipelines.load("x")
    pipelines.load("x", "float16")
    assert asked == ["bfloat16", "float16"]


def test_inference_needs_no_torch():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "without_torch.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
