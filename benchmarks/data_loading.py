"""How many examples per second the data path gives to a training that takes no time, and how many preparing takes in.

    python -m benchmarks.data_loading --examples=2000

Photograph-like JPEGs (640 x 480, quality 90) are written to a temporary folder with a JSONL manifest and prepared. Then are
timed in turn, several times: the training's loader on the prepared shards, plain PIL in a torch DataLoader on the JPEGs
(with the same crop; only where torch is installed), and preparing itself. Everything is in the page cache. Printed is a
Markdown table of medians, with ratios to the first row.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from unipic2_jax.data.buckets import bucket_size, crop_to

EXAMPLES = flags.DEFINE_integer("examples", 2000, "Pictures.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples of a batch.", lower_bound=1)
RESOLUTION = flags.DEFINE_integer("resolution", 512, "Of the prepared pictures, pixels.")
REPEATS = flags.DEFINE_integer("repeats", 3, "How often each is timed.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 16, "Of the training's loader.")

WIDTH, HEIGHT, ASPECT = 640, 480, "4:3"
WORKERS = (0, 2)


def write_pictures(folder: Path, count: int) -> Path:
    """Smooth random pictures with some grain, and the manifest that is returned."""
    lines = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + rng.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)
        lines.append(json.dumps({"image": f"{number}.jpg", "prompt": f"picture {number}"}) + "\n")
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(lines))
    return manifest


def prepare_pictures(manifest: Path, out: Path, workers: int) -> None:
    """What launch.prepare_data does."""
    from unipic2_jax.data.prepare import prepare
    from unipic2_jax.data.records import make_records

    source = make_records({"kind": "jsonl", "path": str(manifest)})
    prepare(source, out, workers=workers, resolution=RESOLUTION.value)


def prepared_batches(folder: Path, batch_size: int) -> Iterator[np.ndarray]:
    """Batches uint8 [B, H, W, 3] without end, through the loader that training uses."""
    from unipic2_jax.data.batches import BatchPlan
    from unipic2_jax.data.examples import make_examples
    from unipic2_jax.data.loader import Loader

    source = make_examples({"kind": "prepared", "path": str(folder)}, seed=0, task="t2i")
    phases = [(0, RESOLUTION.value)]
    plan = BatchPlan(("t2i",), {"t2i": source.buckets}, batch_size, 0, phases, source.multiple)
    collate = lambda shape, examples: np.stack([example.image for example in examples])
    loader = Loader({"t2i": source}, plan, collate, threads=THREADS.value)
    return (loader.batch(step)[1] for step in itertools.count())


class RawPictures:
    """The JPEGs as a map-style dataset: uint8 [H, W, 3] of the bucket's size."""

    def __init__(self, folder: Path, count: int, resolution: int):
        self.folder, self.count, self.size = folder, count, bucket_size(ASPECT, resolution)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        with Image.open(self.folder / f"{index}.jpg") as picture:
            return np.array(crop_to(picture.convert("RGB"), *self.size))


def raw_batches(folder: Path, count: int, batch_size: int, workers: int) -> Iterator[Any]:
    """Batches of one epoch through torch's DataLoader, shuffled."""
    from torch.utils.data import DataLoader

    # Forked workers could hang: this process has threads of JAX.
    context = "spawn" if workers else None
    return iter(
        DataLoader(
            RawPictures(folder, count, RESOLUTION.value),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            multiprocessing_context=context,
        )
    )


def rate(batches: Iterator[Any], count: int, batch_size: int) -> float:
    """Examples per second after the first batch, which starts workers and threads."""
    next(batches)
    start = time.perf_counter()
    seen = sum(1 for _ in itertools.islice(batches, count // batch_size - 1))
    return seen * batch_size / (time.perf_counter() - start)


def main(argv: list[str]) -> None:
    del argv
    count, batch = EXAMPLES.value, BATCH_SIZE.value
    if count < 4 * batch:
        raise app.UsageError(f"{count} examples are too few to time batches of {batch}; give at least {4 * batch}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        raw, prepared = folder / "raw", folder / "prepared"
        fresh = (folder / f"again{i}" for i in itertools.count())
        raw.mkdir()
        manifest = write_pictures(raw, count)
        prepare_pictures(manifest, prepared, workers=0)

        def preparing(workers: int) -> float:
            start = time.perf_counter()
            prepare_pictures(manifest, next(fresh), workers)
            return count / (time.perf_counter() - start)

        timed: dict[str, Callable[[], float]] = {}
        if importlib.util.find_spec("torch"):
            for workers in WORKERS:
                timed[f"JPEGs, PIL, torch DataLoader, {workers} workers"] = lambda workers=workers: rate(
                    raw_batches(raw, count, batch, workers), count, batch
                )
        else:
            print("torch is not installed here, so its DataLoader is left out.\n")
        timed[f"prepared shards, training's loader, {THREADS.value} threads"] = lambda: rate(
            prepared_batches(prepared, batch), count, batch
        )
        for workers in WORKERS:
            timed[f"preparing, {workers} workers"] = lambda workers=workers: preparing(workers)
        rates: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(REPEATS.value):
            for name, measure in timed.items():
                rates[name].append(measure())
    print(
        f"{count} JPEGs of {WIDTH} x {HEIGHT}, batches of {batch} at resolution {RESOLUTION.value}, {REPEATS.value} repeats;"
    )
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}\n")
    first = statistics.median(next(iter(rates.values())))
    print("| | examples/s | range | ratio |\n|---|---:|---:|---:|")
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.0f} | {min(found):.0f} to {max(found):.0f} | {middle / first:.2f} |")


if __name__ == "__main__":
    app.run(main)
