"""Pictures from text.

    python -m launch.generate --prompt="a red circle left of a blue square" --out=out.png
    python -m launch.generate --prompt="a red circle" --prompt="two green crosses" --num_images=4 --out=pictures
    python -m launch.generate --prompt="a red circle" --lora=runs/mine/stages/finetune:0.8 --out=out.png
    python -m launch.generate --model=stabilityai/stable-diffusion-3.5-medium --prompts_file=prompts.jsonl --out=pictures

With `--out=x.png` one picture is written as it is and several become one contact sheet. Any other `--out` is a folder:
it gets every picture, a contact sheet, and `images.jsonl` with the prompt and seed of each picture.
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
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, 'Prompts: one per line, or JSONL with "prompt" in each line.')
OUT = flags.DEFINE_string("out", "out.png", "Picture file (.png, .jpg, .webp) or folder to write.")
HEIGHT = flags.DEFINE_integer("height", None, "Pixels; the model's default if not given.")
WIDTH = flags.DEFINE_integer("width", None, "Pixels; the model's default if not given.")
STEPS = flags.DEFINE_integer("steps", 50, "Sampling steps.")
GUIDANCE = flags.DEFINE_float("guidance", 3.5, "Guidance scale; 1 switches guidance off.")
SEED = flags.DEFINE_integer("seed", 0, "Picture k has the seed SEED + k.")
NEGATIVE = flags.DEFINE_string("negative", None, "What not to draw; the model's own if not given.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures per prompt.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "At most this many pictures at a time.")
SOLVER = cli.solver_flag()
INTERVAL = cli.interval_flag()
RESIDENT = cli.resident_flag()
DTYPE = cli.dtype_flag()


def main(argv: list[str]) -> None:
    del argv
    work = [jobs.Job(prompt) for prompt in PROMPT.value]
    if PROMPTS_FILE.value is not None:
        work += jobs.read_jobs(PROMPTS_FILE.value)
    if any(job.images for job in work):
        raise ValueError(f"{PROMPTS_FILE.value} holds input images; use launch.edit for edits.")
    if not work:
        raise ValueError("There is no prompt; give --prompt or --prompts_file.")
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
    }
    pipe = pipelines.load(MODEL.value, DTYPE.value, vlm=VLM.value, loras=LORA.value, resident=RESIDENT.value)
    print(f"{MODEL.value}: {pipe.bundle.conditioner.description}", file=sys.stderr)
    for path in jobs.run(pipe, work, target, progress=True, **options):
        print(path)


if __name__ == "__main__":
    cli.run(main)
