"""From here to PyTorch.

python -m convert.to_torch --src=checkpoints/sd35 --dst=out/sd35
python -m convert.to_torch --src=checkpoints/sd35 --dst=out/sd3.5_medium.safetensors
python -m convert.to_torch --src=checkpoints/lora --dst=out/pytorch_lora_weights.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from launch import cli
from unipic2_jax.models import convert
from unipic2_jax.weights import io

SRC = flags.DEFINE_string("src", None, "Folder made by convert.from_torch, or a model folder in diffusers layout.")
DST = flags.DEFINE_string("dst", None, "New folder (diffusers layout) or .safetensors file (single file, LoRA).")
LAYOUT = flags.DEFINE_enum("layout", None, ["diffusers", "single_file"], "Layout of --dst; by default read from it.")
MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", io.MAX_SHARD_BYTES / 1e9, "Largest file in a folder, in GB.", 1e-6)
flags.mark_flags_as_required(["src", "dst"])


def main(argv: Sequence[str]) -> None:
    del argv
    lines = convert.to_torch(SRC.value, DST.value, LAYOUT.value, int(MAX_SHARD_GB.value * 1e9))
    print("\n".join([*lines, f"wrote {DST.value}"]))


if __name__ == "__main__":
    cli.run(main, compiles=False)
