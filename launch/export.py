"""Writes a model or an EditReward in another precision: `python -m launch.export --model DIR --out DIR --dtype float16`."""

from __future__ import annotations

from absl import flags

from launch import cli

_MODEL = flags.DEFINE_string("model", None, "Folder of the model.")
_OUT = flags.DEFINE_string("out", None, "Folder to write, in the same layout.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Of the written weights.")
flags.mark_flags_as_required(["model", "out"])


def main(argv: list[str]) -> None:
    """Loads and saves."""
    del argv
    from unipic2_jax.pipelines.bundle import load_bundle, save_bundle
    from unipic2_jax.pipelines.edit_reward import EditRewardModel, is_edit_reward

    if is_edit_reward(_MODEL.value):
        EditRewardModel.load(_MODEL.value).save(_OUT.value, _DTYPE.value)
        return
    save_bundle(load_bundle(_MODEL.value), _OUT.value, _DTYPE.value)


if __name__ == "__main__":
    cli.run(main)
