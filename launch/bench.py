"""Times the transformer's forward pass, training step, rollout and GRPO update, beside PyTorch's where it is installed.

    python -m launch.bench
    python -m launch.bench --works=t2i,edit --num_steps=28 --guidance=3.5       # whole pictures beside diffusers' pipeline
    python -m launch.bench --size=sd35_medium --height=512 --width=512 --text_tokens=333 --attention=cudnn

Printed is a Markdown table of medians. PyTorch needs `torch`, `diffusers` and `peft`, and the device that JAX has.
"""

from __future__ import annotations

import functools
import itertools
import os

from absl import flags

from launch import cli

SIZE = flags.DEFINE_string("size", "mid", "Of the transformer: mid (130M parameters), sd35_medium, tiny.")
HEIGHT = flags.DEFINE_integer("height", 256, "Of the pictures, pixels.")
WIDTH = flags.DEFINE_integer("width", 256, "Of the pictures, pixels.")
BATCH = flags.DEFINE_integer("batch", 4, "Samples.")
MICRO_BATCH = flags.DEFINE_integer("micro_batch", None, "Samples that the update takes at a time; all if not given.")
REFERENCES = flags.DEFINE_integer("references", 1, "Pictures that an edit starts from; 0: text to image.")
TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 154, "Of the conditioning.")
LORA_RANK = flags.DEFINE_integer("lora_rank", 32, "Of rollout and update.")
NUM_STEPS = flags.DEFINE_integer("num_steps", 3, "Of the rollout; the update trains all but the last.")
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "Scale, of rollout and update; 1: none, and half the work.")
DTYPE = flags.DEFINE_string(
    "dtype", None, "Of the arithmetic: float32, which is a CPU's default, or bfloat16, which is an accelerator's."
)
REMAT = flags.DEFINE_string(
    "remat",
    "dots",
    "What a block keeps for the backward pass: full, attention, dots, none. PyTorch checkpoints under full.",
)
ATTENTION = flags.DEFINE_string("attention", "auto", "Ours: auto, xla, cudnn (GPU and bfloat16), splash (TPU).")
WORKS = flags.DEFINE_list(
    "works",
    None,
    "Which: product (a matrix product alone), forward, flow, rollout, update; all of these if not given. "
    "Whole pictures, encoded, denoised and decoded: t2i, edit.",
)
REPEATS = flags.DEFINE_integer("repeats", 5, "How often each is timed, after two warm-ups.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", None, "Of both sides on a CPU; all cores if not given.", lower_bound=1)
TORCH = flags.DEFINE_bool("torch", True, "Whether to time PyTorch too, where it is installed.")
COMPILE = flags.DEFINE_bool("compile", False, "PyTorch's blocks through torch.compile.")


def main(argv: list[str]) -> None:
    """Prints the table, row by row."""
    del argv
    threads = THREADS.value or os.cpu_count()
    cli.keep_freed_memory()
    # Before JAX looks for devices: the size of XLA's pool of threads, and memory as it is needed, because PyTorch needs some too.
    os.environ.update(NPROC=str(threads), XLA_PYTHON_CLIENT_PREALLOCATE="false")
    import jax

    from unipic2_jax.perf import bench, bench_pictures
    from unipic2_jax.perf.bench_settings import Settings
    from unipic2_jax.perf.topology import find_chip

    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    given = {name: flag.value for name, flag in _fields().items() if flag.value is not None}
    settings = Settings(**{"dtype": "float32" if cpu else "bfloat16", **given})
    if settings.dtype == "float32":
        # A GPU would round factors to TF32, which PyTorch does not.
        jax.config.update("jax_default_matmul_precision", "highest")
    chip = find_chip(device) if settings.dtype == "bfloat16" else None
    torch_device, why = bench.torch_device(device.platform) if TORCH.value else (None, "JAX alone, as --notorch asks")
    where = f"CPU, {threads} threads" if cpu else device.device_kind
    inputs = bench.make_inputs(settings)
    count = sum(leaf.size for leaf in jax.tree.leaves(bench.weight_shapes(settings.transformer)))
    print(
        f"{settings.size}: {count / 1e6:.0f}M parameters, {settings.batch} samples of {settings.tokens} + "
        f"{settings.references * settings.tokens} + {settings.text_tokens} tokens, {settings.dtype}, {where}; {why}\n"
    )
    sides, theirs = [bench.Ours(settings, inputs)], None
    if torch_device:
        import torch

        from unipic2_jax.perf import bench_pictures_torch
        from unipic2_jax.perf.bench_torch import Theirs

        torch.set_num_threads(threads)
        sides.append(Theirs(settings, inputs, torch_device, COMPILE.value))
        theirs = functools.partial(bench_pictures_torch.Theirs, device=torch_device, compiled=COMPILE.value)
    print(bench.heading([side.name for side in sides], chip), flush=True)
    measured = (
        bench.measure(settings, sides, REPEATS.value),
        bench_pictures.measure(settings, theirs, REPEATS.value),
    )
    for row in itertools.chain(*measured):
        print(bench.line(row, chip), flush=True)


def _fields() -> dict[str, flags.FlagHolder]:
    """The flags that are fields of `bench_settings.Settings`."""
    return {
        "size": SIZE,
        "height": HEIGHT,
        "width": WIDTH,
        "batch": BATCH,
        "micro_batch": MICRO_BATCH,
        "references": REFERENCES,
        "text_tokens": TEXT_TOKENS,
        "lora_rank": LORA_RANK,
        "num_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE,
        "dtype": DTYPE,
        "remat": REMAT,
        "attention": ATTENTION,
        "works": WORKS,
    }


if __name__ == "__main__":
    cli.run(main)
