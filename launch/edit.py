"""Edits of pictures.

    python -m launch.edit --image=in.png --prompt="make the circle green" --out=out.png
    python -m launch.edit --image=in.png --prompt="remove the square" --prompt="add a red cross" --out=edits
    python -m launch.edit --prompts_file=edits.jsonl --out=edits

A line of the JSONL file is {"image": "in.png", "prompt": "..."}, or any other edit of docs/data.md#which-field-is-what, such as
one with "input_images" (several references) and "instruction"; paths are relative to the file. What `--out` gets: see
`launch.generate`; the contact sheet shows each source before its edits.
"""

from __future__ import annotations

import sys

from absl import flags

from launch import cli
from unipic2_jax import pipelines
from unipic2_jax.pipelines import jobs

MODEL = flags.DEFINE_string("model", pipelines.TINY, "Model folder in diffusers layout, or hub id.")
LORA = cli.lora_flag()
VLM = flags.DEFINE_string(
    "vlm", None, "Qwen2.5-VL of a MetaQuery model, folder or hub id; vlm/ in the model if not given."
)
IMAGE = flags.DEFINE_multi_string("image", [], "Picture to edit; several are references of the same edit.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to change; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "JSONL file of edits.")
OUT = flags.DEFINE_string("out", "out.png", "Picture file (.png, .jpg, .webp) or folder to write.")
HEIGHT = flags.DEFINE_integer("height", None, "Pixels; follows the first picture if not given.")
WIDTH = flags.DEFINE_integer("width", None, "Pixels; follows the first picture if not given.")
STEPS = flags.DEFINE_integer("steps", 50, "Sampling steps.")
GUIDANCE = flags.DEFINE_float("guidance", 3.5, "Guidance scale; 1 switches guidance off.")
SEED = flags.DEFINE_integer("seed", 0, "Picture k has the seed SEED + k.")
NEGATIVE = flags.DEFINE_string(
    "negative", None, "What not to draw; the model's own if not given: the published quality string at full size."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures per edit.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "At most this many pictures at a time.")
KEEP_ASPECT = flags.DEFINE_bool("keep_aspect", False, "Keep references in their own aspect ratio instead of resizing.")
MODE = flags.DEFINE_bool("mode", False, "Use the mean of the references' latents instead of a sample.")
SOLVER = cli.solver_flag()
INTERVAL = cli.interval_flag()
RESIDENT = cli.resident_flag()
DTYPE = cli.dtype_flag()


def main(argv: list[str]) -> None:
    del argv
    if PROMPT.value and not IMAGE.value:
        raise ValueError("There is no picture to edit; give --image, or --prompts_file alone.")
    if IMAGE.value and not PROMPT.value:
        raise ValueError("There is nothing to change; give --prompt.")
    work = [jobs.Job(prompt, tuple(IMAGE.value)) for prompt in PROMPT.value]
    if PROMPTS_FILE.value is not None:
        work += jobs.read_jobs(PROMPTS_FILE.value, task="edit")
    if not work:
        raise ValueError("There is no edit; give --image and --prompt, or --prompts_file.")
    if bare := [job for job in work if not job.images]:
        raise ValueError(f'The edit {bare[0].prompt!r} has no input image; add "image" to its line.')
    target = jobs.check_target(OUT.value)
    options = {
        "negative_prompt": NEGATIVE.value,
        "height": HEIGHT.value,
        "width": WIDTH.value,
        "num_inference_steps": STEPS.value,
        "solver": SOLVER.value,
        "guidance_interval": cli.numbers("guidance_interval", INTERVAL.value),
        "guidance_scale": GUIDANCE.value,
        "seed": SEED.value,
        "num_images_per_prompt": NUM_IMAGES.value,
        "batch_size": BATCH_SIZE.value,
        "reference_mode": "mode" if MODE.value else "sample",
        "resize_references": not KEEP_ASPECT.value,
    }
    work = jobs.load_images(work)
    pipe = pipelines.load(MODEL.value, DTYPE.value, vlm=VLM.value, loras=LORA.value, resident=RESIDENT.value)
    print(f"{MODEL.value}: {pipe.bundle.conditioner.description}", file=sys.stderr)
    for path in jobs.run(pipe, work, target, progress=True, **options):
        print(path)


if __name__ == "__main__":
    cli.run(main)
