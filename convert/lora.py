"""A LoRA file in another layout.

    python -m convert.lora --src=kohya.safetensors --base=stable-diffusion-3.5-medium --dst=pytorch_lora_weights.safetensors
    python -m convert.lora --src=runs/finetune/stages/finetune --base=DIR --layout=kohya --dst=lora.safetensors

docs/weights.md lists the layouts that are read.
"""

from __future__ import annotations

from absl import flags

from launch import cli
from unipic2_jax.models.sd3 import lora_file as lora
from unipic2_jax.models.sd3.lora_writing import write_lora

SRC = flags.DEFINE_string("src", None, "LoRA file, or the folder that holds one.")
DST = flags.DEFINE_string("dst", None, "File to write (.safetensors), or folder.")
BASE = flags.DEFINE_string("base", None, "Folder of the model that it was made for.")
LAYOUT = flags.DEFINE_enum("layout", "diffusers", list(lora.LAYOUTS), "Layout to write.")
flags.mark_flags_as_required(["src", "dst", "base"])


def main(argv: list[str]) -> None:
    del argv
    from unipic2_jax.models.bundle import read_configs

    configs = read_configs(BASE.value)
    adapter = lora.read_lora(SRC.value, configs)
    print(f"{write_lora(DST.value, adapter, configs, LAYOUT.value)}: {adapter}")


if __name__ == "__main__":
    cli.run(main, compiles=False)
