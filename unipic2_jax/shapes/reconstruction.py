"""The suite 'shapes:reconstruct': the autoencoder alone, by what the verifier still reads behind it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from unipic2_jax.evaluation.benchmark import BENCHMARKS, Benchmark, Item, Mark, Report, Subject, digest
from unipic2_jax.evaluation.picture_benchmark import write_picture
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.sampling import decode_latents, encode_images, from_uint8
from unipic2_jax.pictures.decode import read_image
from unipic2_jax.pictures.resize import to_uint8
from unipic2_jax.shapes.verify import read_scenes
from unipic2_jax.shapes.world import Scene, random_scene, render

READABLE_GATE = 0.97
# Scenes are numbered by seed; training never uses this one.
HELD_OUT_SEED = 2**31


@BENCHMARKS.register("shapes:reconstruct")
@dataclasses.dataclass(frozen=True)
class ShapesReconstruction(Benchmark):
    """Held-out scenes of one to four objects, encoded and decoded (the mode), and read back.

    Attributes:
      scenes: how many are tried.
    """

    scenes: int = 1000

    @functools.cached_property
    def _truth(self) -> list[Scene]:
        rng = np.random.default_rng(HELD_OUT_SEED)
        return [random_scene(rng, int(rng.integers(1, 5))) for _ in range(self.scenes)]

    def items(self) -> list[Item]:
        return [Item(f"{n:05}", f"{len(scene.things)} objects", scene, number=n) for n, scene in enumerate(self._truth)]

    def made(self, works: Path, items: Sequence[Item]) -> set[str]:
        return {item.key for item in items if _file(works, item).is_file()}

    def make(self, subject: Subject, works: Path, items: Sequence[Item]) -> None:
        program, params = reconstruct(subject.bundle), subject.bundle.params["vae"]
        for batch in tqdm(_batches(items), desc="reconstructing", disable=None):
            decoded = np.asarray(program(params, np.stack([render(item.task) for item in batch])))
            for item, picture in zip(batch, decoded, strict=True):
                write_picture(_file(works, item), picture)

    def digests(self, works: Path, items: Sequence[Item]) -> dict[str, str]:
        return {item.key: digest(_file(works, item).read_bytes()) for item in items}

    def mark(self, works: Path, items: Sequence[Item]) -> Iterator[list[Mark]]:
        """Whether a scene is read back unchanged from its render, and from its reconstruction; how many of its objects; the error."""
        for batch in _batches(items):
            truth = np.stack([render(item.task) for item in batch])
            decoded = np.stack([np.asarray(read_image(_file(works, item))) for item in batch])
            errors = np.mean((truth.astype(np.float64) - decoded) ** 2, axis=(1, 2, 3))
            yield [
                Mark(
                    item.key,
                    values={
                        "clean": [float(clean == item.task)],
                        "decoded": [float(seen == item.task)],
                        "objects": [_kept_objects(item.task, seen)],
                        "squared_error": [float(error)],
                    },
                )
                for item, clean, seen, error in zip(
                    batch, read_scenes(truth), read_scenes(decoded), errors, strict=True
                )
            ]

    def report(self, works: Path, items: Sequence[Item], marks: Sequence[Mark]) -> Report:
        sound = [(item, mark.values) for item, mark in zip(items, marks, strict=True) if mark.values]
        column = lambda name: np.array([values[name][0] for _, values in sound])
        objects = sum(len(item.task.things) for item, _ in sound)
        scores = {
            "scenes": len(sound),
            "clean": float(column("clean").mean()),
            "decoded": float(column("decoded").mean()),
            "objects": float(column("objects").sum() / objects),
            "psnr": float(10 * np.log10(255**2 / column("squared_error").mean())),
        }
        beside = f"(objects {scores['objects']:.4f}, PSNR {scores['psnr']:.1f} dB)"
        text = [
            f"held-out scenes              {scores['scenes']}",
            f"read back from clean renders {scores['clean']:.3f}",
            f"read back after the VAE      {scores['decoded']:.3f}   {beside}",
        ]
        return Report(scores, "\n".join(text))

    def headline(self, scores: Mapping[str, Any]) -> dict[str, float]:
        return {"decoded": scores["decoded"]}

    def gates(self, scores: Mapping[str, Any]) -> list[str]:
        missed = []
        if scores["clean"] < 1:
            missed.append(f"The verifier reads {scores['clean']:.3f} of clean renders, not all.")
        if scores["decoded"] < READABLE_GATE:
            missed.append(f"The VAE keeps {scores['decoded']:.3f} of scenes readable, fewer than {READABLE_GATE}.")
        return missed


def reconstruct(bundle: Bundle) -> Any:
    """(parameters of the VAE, uint8 [B, H, W, 3]) -> the same after encoding and decoding; one compiled program."""

    def decoded(params, images):
        return to_uint8(decode_latents(bundle.vae, params, encode_images(bundle.vae, params, from_uint8(images))))

    return jax.jit(decoded)


def _batches(items: Sequence[Item], size: int = 100) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _file(works: Path, item: Item) -> Path:
    return works / f"{item.key}.png"


def _kept_objects(truth: Scene, seen: Scene) -> float:
    return float(sum(seen.at(thing.cell) == thing for thing in truth.things))
