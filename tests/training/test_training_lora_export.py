"""The LoRA that each stage of reinforcement leaves draws in diffusers what it draws here."""

import numpy as np
import pytest
import toy_grpo  # noqa: F401 (registers the reward 'brightness')
from pipelines_common import small_bundle

from unipic2_jax.pipelines import Pipeline, load_bundle, save_bundle
from unipic2_jax.training import loop
from unipic2_jax.training.config import make_config

PROMPTS = ["a red circle left of a blue square", "two green crosses"]
RANK, ALPHA = 4, 8.0


def stage(task):
    return {
        **{"kind": "grpo", "steps": 2, "num_prompts": 2, "height": 24, "width": 24, "use_ema": False},
        "source": {"kind": "shapes", "task": task},
        "rewards": {"brightness": {}},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "grpo": {"num_steps": 4, "group_size": 4, "guidance_scale": 1.0},
        # Large steps: two of them are to change the pictures.
        "optimizer": {"lr": 0.03},
    }


def psnr(a, b):
    return -10 * np.log10(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))


def test_diffusers_draws_with_the_lora_of_each_stage(tmp_path):
    torch = pytest.importorskip("torch", reason="parity tests need PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="parity tests need diffusers")
    pytest.importorskip("peft", reason="diffusers loads a LoRA by peft")
    folder, workdir = tmp_path / "model", tmp_path / "run"
    bundle = small_bundle()
    save_bundle(bundle, folder)
    stages = {task: stage(task) for task in ("edit", "t2i")}
    loop.run(make_config({"init": str(folder), "schedule": tuple(stages), "stages": stages}), workdir)

    noise = np.random.default_rng(0).standard_normal((2, 16, 6, 6)).astype(np.float32)
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "np"}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    for name in stages:
        theirs.load_lora_weights(workdir / "stages" / name, adapter_name=name)

    def drawn(adapters):
        theirs.set_adapters(adapters)
        size = {"height": 24, "width": 24, "max_sequence_length": 12}
        return theirs(PROMPTS, latents=torch.from_numpy(noise), **size, **options).images

    # After the first stage: its file alone. After the second, whose LoRA was trained on top of the merged first: both.
    made, pipe = {}, Pipeline(bundle)
    for adapters in (("edit",), ("edit", "t2i")):
        pipe.load_lora(workdir / "stages" / adapters[-1], name=adapters[-1])
        made[adapters] = pipe(PROMPTS, latents=noise, **options).images
        assert psnr(made[adapters], drawn(list(adapters))) >= 50
    merged = Pipeline(load_bundle(workdir / "export"))(PROMPTS, latents=noise, **options).images
    assert psnr(merged, made["edit", "t2i"]) >= 50
    before = Pipeline(bundle)(PROMPTS, latents=noise, **options).images
    assert psnr(before, made["edit",]) < 40 and psnr(made["edit",], made["edit", "t2i"]) < 40
