"""Writes a model in another precision: `python -m launch.export --model DIR --out DIR --dtype float16`."""

from __future__ import annotations

from absl import flags

from launch import cli

_MODEL = flags.DEFINE_string("model", None, "Folder of the model.")
_OUT = flags.DEFINE_string("out", None, "Folder to write, in diffusers layout.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16"], "Of the written weights.")
flags.mark_flags_as_required(["model", "out"])


def main(argv: list[str]) -> None:
    """Loads and saves."""
    del argv
    from unipic2_jax.pipelines.bundle import load_bundle, save_bundle

    save_bundle(load_bundle(_MODEL.value), _OUT.value, _DTYPE.value)


if __name__ == "__main__":
    cli.run(main)
