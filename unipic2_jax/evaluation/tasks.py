"""Scores a model on a list of tasks with fixed seeds; training stages and `launch.evaluate` share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from unipic2_jax.data.prompts import PromptRecord
from unipic2_jax.evaluation.grids import contact_sheet
from unipic2_jax.parallel.mesh import replicated, shard_batch
from unipic2_jax.pipelines.sampling import from_uint8, image_keys, initial_noise, sample_images, to_uint8
from unipic2_jax.rewards.base import Reward


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model scored.

    Attributes:
      values: float64 [prompts, samples], the reward.
      details: the reward's details by name, same shape.
      tags: one per prompt.
      images: uint8 [prompts, samples, H, W, 3].
    """

    values: np.ndarray
    details: dict[str, np.ndarray]
    tags: tuple[str, ...]
    images: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """The strict verdicts where the reward has them, else the values."""
        return self.details.get("correct", self.values)

    def by_tag(self, name: str = "correct") -> dict[str, float]:
        """Mean of a detail for each tag, in the order of their first appearance."""
        scores = self.details.get(name, self.correct)
        tags = np.asarray(self.tags)
        return {tag: float(np.nanmean(scores[tags == tag])) for tag in dict.fromkeys(self.tags)}

    @property
    def overall(self) -> float:
        """Mean of the tags' means, as GenEval counts."""
        return float(np.mean(list(self.by_tag().values())))

    def sheet(
        self, records: Sequence[PromptRecord], prompts: int = 12, samples: int = 3, scale: int = 2
    ) -> Image.Image:
        """A contact sheet: a row a prompt, with the source picture first when there is one."""
        pictures, captions = [], []
        for row, record in enumerate(records[:prompts]):
            if record.image is not None:
                pictures.append(record.image)
                captions.append("source")
            for picture, good in zip(self.images[row, :samples], self.correct[row]):
                pictures.append(picture)
                captions.append(f"{'+' if good == 1 else '-'} {record.prompt}")
        columns = min(samples, self.images.shape[1]) + (records[0].image is not None)
        return contact_sheet([Image.fromarray(picture) for picture in pictures], captions, columns=columns, scale=scale)


class TaskEvaluator:
    """Generates `samples` images for every record by the ODE and scores them; the program compiles once.

    Image j of record i has the seed `seed * 1,000,003 + i * samples + j`, whatever the batch size or number of devices.

    Attributes:
      batch_size: images at a time; a multiple of the number of devices.
      guidance_scale: 1 or less evaluates without guidance.
    """

    def __init__(
        self,
        bundle: Any,
        records: Sequence[PromptRecord],
        reward: Reward,
        mesh: jax.sharding.Mesh,
        *,
        samples: int = 4,
        num_steps: int = 40,
        guidance_scale: float = 3.5,
        height: int,
        width: int,
        seed: int = 0,
        batch_size: int = 64,
    ):
        if not records:
            raise ValueError("There are no prompts to evaluate; give at least one.")
        self.records, self.reward, self.mesh, self.bundle = list(records), reward, mesh, bundle
        self.samples, self.batch_size = samples, batch_size
        index = np.arange(len(records) * samples)
        self.seeds = (np.uint32(seed) * np.uint32(1_000_003) + index).astype(np.uint32)
        self.tokens = bundle.conditioner.tokenize([record.prompt for record in records])
        factor = bundle.vae.config.downsampling
        shape = (height // factor, width // factor, bundle.vae.config.latent_channels)
        sigmas = bundle.scheduler.sigmas(num_steps)
        negative = bundle.conditioner.tokenize([""]) if guidance_scale > 1 else None

        def sample(params, lora, tokens, seeds, references):
            images = sample_images(
                bundle,
                params,
                tokens,
                initial_noise(image_keys(seeds), shape),
                sigmas,
                negative_tokens=negative,
                guidance_scale=guidance_scale,
                reference_images=None if references is None else from_uint8(references),
                lora=lora,
            )
            return to_uint8(images)

        self._sample = jax.jit(sample, out_shardings=replicated(mesh))

    def __call__(self, params: Any, lora: Any = None) -> Evaluation:
        """Scores the policy `(params, lora)`; `params` has the bundle's groups."""
        total = len(self.seeds)
        images = []
        for start in range(0, total, self.batch_size):
            index = np.arange(start, start + self.batch_size) % total  # the last batch wraps round and is cut below
            rows = index // self.samples
            batch = {"tokens": {name: ids[rows] for name, ids in self.tokens.items()}, "seeds": self.seeds[index]}
            if self.records[0].image is not None:
                batch["references"] = np.stack([self.records[row].image for row in rows])[:, None]
            batch = shard_batch(batch, self.mesh)
            images.append(
                np.asarray(self._sample(params, lora, batch["tokens"], batch["seeds"], batch.get("references")))
            )
        images = np.concatenate(images)[:total]
        owners = [self.records[i // self.samples] for i in range(total)]
        scores = self.reward.score(list(images), owners)
        fold = lambda x: np.asarray(x).reshape(len(self.records), self.samples, *np.shape(x)[1:])
        tags = tuple(str(record.metadata.get("tag", "all")) for record in self.records)
        return Evaluation(fold(scores.values), {k: fold(v) for k, v in scores.details.items()}, tags, fold(images))
