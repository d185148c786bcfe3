"""From PyTorch to here.

    python -m convert.from_torch --src=stable-diffusion-3.5-medium --dst=checkpoints/sd35
    python -m convert.from_torch --src=sd3.5_medium.safetensors --base=stable-diffusion-3.5-medium --dst=checkpoints/sd35
    python -m convert.from_torch --src=pytorch_lora_weights.safetensors --base=checkpoints/sd35 --dst=checkpoints/lora

The folder it makes is the diffusers folder with each network's weights as an Orbax checkpoint; `convert.to_torch` goes
back to the same names, dtypes and bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from launch import cli
from unipic2_jax.models import convert

SRC = flags.DEFINE_string(
    "src", None, "Model folder in diffusers layout, folder of one network, single-file checkpoint, or LoRA file."
)
DST = flags.DEFINE_string("dst", None, "Folder to make; it must be new or empty.")
BASE = flags.DEFINE_string("base", None, "Model folder that supplies what a file lacks: configs, tokenizers, networks.")
flags.mark_flags_as_required(["src", "dst"])


def main(argv: Sequence[str]) -> None:
    del argv
    lines = convert.from_torch(SRC.value, DST.value, BASE.value)
    print("\n".join([*lines, f"wrote {DST.value}"]))


if __name__ == "__main__":
    cli.run(main, compiles=False)
