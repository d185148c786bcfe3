"""Prepares pictures and prompts for training: decoded, filtered, sorted into buckets, written as shards.

    python -m launch.prepare_data --kind=jsonl --path=data/train.jsonl --out=runs/data/train
    python -m launch.prepare_data --kind=folder --path=data/photos --resolution=1024 --workers=8 --out=runs/data/photos
    python -m launch.prepare_data --kind=jsonl --path=data/edits.jsonl --model=DIR --store=latents,conditioning --out=...

The same command goes on where an interrupted one stopped. With `--model`, what its autoencoder and its conditioner make of
the examples is stored beside them, so that a training in which they are frozen need not compute it again.
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from launch import cli

KIND = flags.DEFINE_string(
    "kind", None, "What the source is: jsonl, folder, webdataset, parquet, tfds ... (docs/data.md), or one of your own."
)
PATH = flags.DEFINE_string("path", None, "File, folder or address of the source.")
OPTIONS = flags.DEFINE_string("options", "{}", 'More options of the kind as JSON: --options=\'{"split": "train"}\'.')
OUT = flags.DEFINE_string("out", None, "Folder or address to write, or to go on with.")
RESOLUTION = flags.DEFINE_integer("resolution", 512, "Pixels: a square picture's edge; other buckets have as many.")
MULTIPLE = flags.DEFINE_integer("multiple", 32, "Pixels that every edge is a multiple of.", lower_bound=1)
ASPECTS = flags.DEFINE_list("aspects", None, "Aspect ratios to sort into, as 1:1,4:3; all of the paper's if not given.")
MIN_SIZE = flags.DEFINE_integer(
    "min_size", None, "Pixels that a picture's shorter edge must have; half the resolution if not given."
)
MAX_ASPECT = flags.DEFINE_float("max_aspect", 2.5, "Pictures whose edges differ by more than this factor are left out.")
MAX_PROMPT = flags.DEFINE_integer("max_prompt", 2000, "Characters; longer prompts are left out with their pictures.")
FORMAT = flags.DEFINE_enum("format", "jpeg", ["jpeg", "png", "webp"], "Of the stored pictures; png loses nothing.")
QUALITY = flags.DEFINE_integer("quality", 95, "Of JPEG and WebP, 1 to 100.")
SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 4096, "Records between two points where a run can go on; a shard holds at most so many examples."
)
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that read and decode; 0: threads of this one.")
MAX_ERRORS = flags.DEFINE_float(
    "max_errors",
    None,
    "Unusable records before it stops: a number, or below 1 a part of all; 1% and at least 10 by default.",
)
MODEL = flags.DEFINE_string("model", None, "Model folder or hub id whose results are stored beside the pictures.")
VLM = flags.DEFINE_string("vlm", None, "Qwen2.5-VL of a MetaQuery model; vlm/ in the model if not given.")
STORE = flags.DEFINE_list("store", [], "What of the model's is stored: latents, conditioning, or both.")
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Of the stored arrays.")
MODEL_DTYPE = flags.DEFINE_enum(
    "model_dtype", "float32", ["float32", "bfloat16", "float16"], "Of the model's weights and arithmetic."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Examples that the model is given at a time.")
flags.mark_flags_as_required(["kind", "out"])


def main(argv: list[str]) -> None:
    del argv
    if STORE.value and not MODEL.value:
        raise ValueError("--store needs a model that computes it; give --model.")
    from unipic2_jax.core.addresses import continued
    from unipic2_jax.data.prepare import describe, prepare
    from unipic2_jax.data.records import make_records

    path = {} if PATH.value is None else {"path": PATH.value}
    source = make_records({"kind": KIND.value, **path, **read_options(OPTIONS.value)})
    aspects = {} if ASPECTS.value is None else {"aspects": tuple(ASPECTS.value)}
    with continued(OUT.value) as folder:
        prepare(
            source,
            folder,
            workers=WORKERS.value,
            max_errors=MAX_ERRORS.value,
            encode=load_encoder() if MODEL.value else None,
            resolution=RESOLUTION.value,
            multiple=MULTIPLE.value,
            **aspects,
            min_size=MIN_SIZE.value,
            max_aspect=MAX_ASPECT.value,
            max_prompt=MAX_PROMPT.value,
            image_format=FORMAT.value,
            quality=QUALITY.value,
            shard_size=SHARD_SIZE.value,
        )
        print(describe(folder))


def read_options(text: str) -> dict[str, Any]:
    """The flag --options as a dictionary."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'--options is not JSON ({error}); write it as \'{{"split": "train"}}\'.') from error
    if not isinstance(options, dict):
        raise ValueError(f"--options must be a JSON object of names and values, not {text}.")
    return options


def load_encoder() -> Any:
    """The encoder that the flags describe."""
    from unipic2_jax.models.bundle import load_bundle
    from unipic2_jax.parallel.mesh import make_mesh
    from unipic2_jax.pipelines.encode_data import ModelEncoder

    mesh = make_mesh()
    bundle = load_bundle(MODEL.value, MODEL_DTYPE.value, mesh, VLM.value)
    return ModelEncoder(
        bundle, STORE.value, name=MODEL.value, dtype=DTYPE.value, batch_size=BATCH_SIZE.value, mesh=mesh
    )


if __name__ == "__main__":
    cli.run(main)
