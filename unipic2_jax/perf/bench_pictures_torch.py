"""Whole pictures of `perf.bench_pictures` by diffusers."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from unipic2_jax.models.bundle import Bundle, save_bundle
from unipic2_jax.perf.bench import Runner
from unipic2_jax.perf.bench_pictures import PROMPT, Asked
from unipic2_jax.perf.bench_settings import Settings
from unipic2_jax.perf.bench_torch import joint_velocity


class Theirs:
    """diffusers' networks with the weights of `bundle`, which pass through a folder.

    Args:
      device: 'cpu' or 'cuda'.
      compiled: whether each block of the transformer goes through torch.compile.
    """

    def __init__(self, settings: Settings, bundle: Bundle, device: str, compiled: bool = False):
        self.name = "diffusers, compiled" if compiled else "diffusers"
        self.settings, self.asked = settings, Asked.by(settings)
        self.device, self.dtype = torch.device(device), getattr(torch, settings.dtype)
        with tempfile.TemporaryDirectory() as folder:
            save_bundle(bundle, folder, settings.dtype)
            self.pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=self.dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.texts = {"max_sequence_length": bundle.conditioner.max_sequence_length}
        if compiled:
            for block in self.pipe.transformer.transformer_blocks:
                block.compile()

    def runner(self, work: str) -> Runner:
        """The runner of one of `bench_settings.PICTURES`."""
        return {"t2i": self._draw, "edit": self._edit}[work]

    def _draw(self) -> dict[str, np.ndarray]:
        noise = torch.from_numpy(self.asked.noise).to(self.device, self.dtype)
        size = {"height": self.settings.height, "width": self.settings.width}
        made = self.pipe(
            PROMPT, latents=noise, num_images_per_prompt=self.settings.batch, output_type="np",
            **size, **self.texts, **self.asked.options,
        )  # fmt: skip
        return {"pictures": made.images}

    @torch.no_grad()
    def _edit(self) -> dict[str, np.ndarray]:
        pipe, batch, scale = self.pipe, self.settings.batch, self.settings.guidance_scale
        context, other_context, pooled, other_pooled = pipe.encode_prompt(
            PROMPT, None, None, negative_prompt=self.asked.options.get("negative_prompt"), device=self.device,
            num_images_per_prompt=batch, do_classifier_free_guidance=scale > 1, **self.texts,
        )  # fmt: skip
        if scale > 1:
            context, pooled = torch.cat([other_context, context]), torch.cat([other_pooled, pooled])
        vae = pipe.vae.config
        source = 2 * torch.from_numpy(self.asked.source).permute(2, 0, 1)[None].to(self.device, self.dtype) - 1
        mean = pipe.vae.encode(source).latent_dist.mode()
        reference = ((mean - vae.shift_factor) * vae.scaling_factor).expand(len(context), -1, -1, -1)
        x = torch.from_numpy(self.asked.noise).to(self.device, self.dtype)
        pipe.scheduler.set_timesteps(self.settings.num_steps, device=self.device)
        for time in pipe.scheduler.timesteps:
            both = torch.cat([x, x]) if scale > 1 else x
            velocity = joint_velocity(pipe.transformer, both.to(self.dtype), time, context, pooled, [reference])
            if scale > 1:
                other, given = velocity.chunk(2)
                velocity = other + scale * (given - other)
            x = pipe.scheduler.step(velocity, time, x, return_dict=False)[0]
        pixels = pipe.vae.decode(x.to(self.dtype) / vae.scaling_factor + vae.shift_factor).sample
        return {"pictures": pipe.image_processor.postprocess(pixels, output_type="np")}
