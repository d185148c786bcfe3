"""Pictures for prompts with fixed seeds, by one compiled program: what evaluations and benchmarks of pictures are made with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unipic2_jax.data.prompts import PromptRecord, source_pictures, stack_sources
from unipic2_jax.models import sampling
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.conditioner import tokenize_negative
from unipic2_jax.parallel.mesh import batch_shards, shard_batch
from unipic2_jax.parallel.processes import to_host
from unipic2_jax.pictures import resize as pictures


class PictureMaker:
    """Makes `samples` pictures of each record; sample j of record i is number `i * samples + j`.

    A number has the seed `config.seed + number`, whatever the batch size or number of devices, so any picture can be made alone.
    """

    def __init__(self, config: ConfigDict, records: Sequence[PromptRecord], bundle: Bundle, mesh: jax.sharding.Mesh):
        self.config, self.records, self.bundle, self.mesh = config, records, bundle, mesh
        factor = bundle.vae.config.downsampling
        pictures.check_size(config.height, config.width, factor * bundle.transformer.config.patch_size)
        self.shape = (config.height // factor, config.width // factor, bundle.transformer.config.in_channels)
        self.sigmas = bundle.scheduler.sigmas(config.num_steps, config.solver)
        devices = batch_shards(mesh)
        self.batch = math.ceil(min(config.batch_size, len(records) * config.samples) / devices) * devices
        self._sample = jax.jit(self._images)

    def _images(self, params, lora, tokens, negative, seeds, sources):
        keys = sampling.image_keys(seeds)
        images = sampling.sample_images(
            self.bundle,
            params,
            tokens,
            sampling.initial_noise(keys, self.shape),
            self.sigmas,
            negative_tokens=negative,
            guidance_scale=self.config.guidance_scale,
            reference_images=sources,
            reference_keys=keys,
            lora=lora,
            solver=self.config.solver,
            guidance_interval=self.config.guidance_interval,
        )
        return pictures.to_uint8(images)

    def make(
        self, params: Any, lora: Any = None, wanted: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers [n], pictures uint8 [n, H, W, 3]) of a batch after the other.

        Args:
          wanted: the numbers to make, in this order; None: all.
        """
        config, conditioner = self.config, self.bundle.conditioner
        numbers = np.arange(len(self.records) * config.samples) if wanted is None else np.asarray(wanted)
        edited = source_pictures(self.records, config.height, config.width)
        sources = stack_sources(edited)
        tokens = conditioner.tokenize([record.prompt for record in self.records], edited)
        guided = config.guidance_scale > 1
        negative = tokenize_negative(conditioner, config.negative_prompt, edited) if guided else None
        # One row serves all prompts, unless it is read together with their images.
        own_negative = negative if conditioner.reads_images and edited is not None else None
        rows = {"tokens": tokens, "negative": own_negative, "sources": None if sources is None else sources[:, None]}
        for start in range(0, len(numbers), self.batch):
            # A short last batch is filled up, so that it does not cost another compilation.
            places = np.minimum(np.arange(start, start + self.batch), len(numbers) - 1)
            index = numbers[places]
            prompts = index // config.samples
            batch = shard_batch(jax.tree.map(lambda x, prompts=prompts: x[prompts], rows), self.mesh)
            seeds = shard_batch((config.seed + index).astype(np.uint32), self.mesh)
            unconditional = negative if own_negative is None else batch["negative"]
            images = self._sample(params, lora, batch["tokens"], unconditional, seeds, batch["sources"])
            count = min(self.batch, len(numbers) - start)
            yield index[:count], to_host(images)[:count]
