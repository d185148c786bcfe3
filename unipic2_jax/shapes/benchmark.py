"""The shapes suite: both tasks on held-out combinations, and what the autoencoder leaves readable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from unipic2_jax.models.sampling import decode_latents, encode_images, from_uint8, to_uint8
from unipic2_jax.shapes.verify import read_scenes
from unipic2_jax.shapes.world import Scene, random_scene, render

# What the shipped checkpoint must reach before reinforcement: room above it, something to stand on below.
OVERALL_GATE = (0.5, 0.85)
TAG_GATE = 0.2
READABLE_GATE = 0.97
# Scenes are numbered by seed; training never uses this one.
HELD_OUT_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class Readability:
    """How well the verifier reads scenes back.

    Attributes:
      scenes: how many were tried.
      clean: share read back unchanged from the render itself (1, or the verifier is broken).
      decoded: share read back unchanged after the autoencoder.
      objects: share of objects read back unchanged after the autoencoder.
      psnr: of the reconstruction, dB.
    """

    scenes: int
    clean: float
    decoded: float
    objects: float
    psnr: float


def readability(bundle: Any, scenes: int = 1000, batch_size: int = 100) -> Readability:
    """Renders held-out scenes of one to four objects, encodes and decodes them (the mode), and reads both."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    truth = [random_scene(rng, int(rng.integers(1, 5))) for _ in range(scenes)]
    images = np.stack([render(scene) for scene in truth])

    @jax.jit
    def reconstruct(params, images):
        return to_uint8(decode_latents(bundle.vae, params, encode_images(bundle.vae, params, from_uint8(images))))

    parts = np.array_split(images, max(1, scenes // batch_size))
    decoded = np.concatenate([np.asarray(reconstruct(bundle.params["vae"], part)) for part in parts])
    clean, seen = read_scenes(images), read_scenes(decoded)
    same = [_kept_objects(a, b) for a, b in zip(truth, seen)]
    error = np.mean((images.astype(np.float64) - decoded) ** 2)
    return Readability(
        scenes=scenes,
        clean=float(np.mean([a == b for a, b in zip(truth, clean)])),
        decoded=float(np.mean([a == b for a, b in zip(truth, seen)])),
        objects=sum(same) / sum(len(scene.things) for scene in truth),
        psnr=float(10 * np.log10(255**2 / error)),
    )


def _kept_objects(truth: Scene, seen: Scene) -> int:
    return sum(seen.at(thing.cell) == thing for thing in truth.things)


def summarize(name: str, metrics: Mapping[str, float], detail: str) -> dict[str, float]:
    """{tag: mean} of one detail of `Evaluator.run`'s metrics, with 'overall', the mean of the tags' means, first."""
    prefix = f"{name}/shapes_{name}_{detail}/"
    tags = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {"overall": float(np.mean(list(tags.values()))), **tags}


def failed_gates(scores: Mapping[str, float], what: str) -> list[str]:
    """One sentence for each gate that a task's scores miss."""
    low, high = OVERALL_GATE
    missed = []
    if not low <= scores["overall"] <= high:
        missed.append(f"{what} overall is {scores['overall']:.3f}, outside [{low}, {high}].")
    missed += [
        f"{what} of '{tag}' is {value:.3f}, not above {TAG_GATE}."
        for tag, value in scores.items()
        if tag != "overall" and value <= TAG_GATE
    ]
    return missed
