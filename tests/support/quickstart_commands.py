"""Runs commands of the project one after the other, each in a fork of a process that has imported them: the imports take longer than
what tiny models do. Reads [[module, argument, ...], ...] as JSON from its input and ends with the first command that fails.

A bucket is a folder: $BUCKETS/my-bucket is gs://my-bucket. GenEval's detector is one that sees nothing, as `detector.kind=blind`.
"""

import importlib
import json
import os
import runpy
import sys
import time

import fsspec
from fsspec.implementations.local import LocalFileSystem

from unipic2_jax.core.registry import discover
from unipic2_jax.rewards.geneval.detectors.base import DETECTORS, Detector

# What commands import, and `launch.cli`, whose flag all of them have.
IMPORTED = (
    *(
        "launch.cli",
        "unipic2_jax.perf.opening",
        "unipic2_jax.pipelines",
        "unipic2_jax.training.loop",
        "unipic2_jax.data.prepare",
    ),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("transformers.models.clip.tokenization_clip", "transformers.models.t5.tokenization_t5"),
)


class Bucket(LocalFileSystem):
    """gs:// of folders."""

    protocol = ("gs",)

    def __init__(self, **options):
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", os.environ["BUCKETS"] + "/", 1))


class Blind(Detector):
    """Finds nothing in any picture; takes the options of the real one, and refuses a GPU as that does where there is none."""

    def __init__(self, device="cuda", **options):
        if device == "cuda" and os.environ["ACCELERATOR"] != "gpu":
            raise ValueError("There is no GPU for the detector.")

    def detect(self, images, wanted):
        return [[] for _ in images]


def main():
    for name in IMPORTED:
        importlib.import_module(name)
    fsspec.register_implementation("gs", Bucket, clobber=True)
    discover()
    DETECTORS.register("blind")(Blind)
    for module, *arguments in json.load(sys.stdin):
        started, child = time.monotonic(), os.fork()
        if not child:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{time.monotonic() - started:.1f} s: {module} {' '.join(arguments)}", flush=True)
        if code:
            sys.exit(f"{module} ended with code {code}")


if __name__ == "__main__":
    main()
