"""Writes a model or an EditReward in another precision, or with LoRAs merged into it.

    python -m launch.export --model=DIR --out=DIR --dtype=float16
    python -m launch.export --model=DIR --lora=runs/finetune/stages/finetune:0.8 --out=DIR

With `--lora` and no `--dtype` all that no LoRA changes is copied bit for bit.
"""

from __future__ import annotations

import sys

from absl import flags

from launch import cli

_MODEL = flags.DEFINE_string("model", None, "Folder, address or hub id of the model.")
_LORA = cli.lora_flag()
_OUT = flags.DEFINE_string("out", None, "Folder or address to write, in the same layout.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "float16", "bfloat16"], "Of the written weights; float32, or with --lora the files' own."
)
flags.mark_flags_as_required(["model", "out"])


def main(argv: list[str]) -> None:
    """Loads and saves."""
    del argv
    from unipic2_jax.core.addresses import local, uploaded
    from unipic2_jax.models.bundle import load_bundle, save_bundle
    from unipic2_jax.models.edit_reward.model import EditRewardModel, is_edit_reward
    from unipic2_jax.pipelines import adapters

    model = local(_MODEL.value)
    with uploaded(_OUT.value) as folder:
        if is_edit_reward(model):
            if _LORA.value:
                raise ValueError(f"{_MODEL.value} is an EditReward, which has a LoRA of its own; leave --lora out.")
            EditRewardModel.load(model).save(folder, _DTYPE.value or "float32")
            return
        loras = adapters.located(_LORA.value)
        bundle = load_bundle(model)
        if not _LORA.value:
            save_bundle(bundle, folder, _DTYPE.value or "float32")
            return
        bundle, changed = adapters.load_fused(bundle, loras)
        save_bundle(bundle, folder, _DTYPE.value, changed=changed)
    print(f"{_OUT.value}: {', '.join(_LORA.value)} merged into {len(changed)} leaves", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, compiles=False)
