"""Measures a model by a benchmark.

    python -m launch.evaluate --suite=shapes [--model=DIR] [--reconstruct] [--gates] [--baseline=JSON] [--out=DIR]    # draws and edits
    python -m launch.evaluate --suite=shapes-vqa --model=DIR [--gates] [--out=DIR]                                    # understands
    python -m launch.evaluate --suite=shapes --generate_only --out=A        # and then, with no model, also elsewhere:
    python -m launch.evaluate --suite=shapes --score_only --works=A/works --out=B

A suite's options are flags as well, which --help shows: --suite=shapes --prompts=20 --samples=2. With --out the same command goes on
where an interrupted one stopped.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli
from unipic2_jax.core.assets import TINY

_SUITE = flags.DEFINE_list("suite", ["shapes"], "What to measure; several with commas between them.")
_MODEL = flags.DEFINE_string("model", str(TINY), "Folder of the model in diffusers layout, or a hub id.")
_LORA = cli.lora_flag()
_DTYPE = cli.dtype_flag()
_OUT = flags.DEFINE_string(
    "out", None, "Folder that receives works, marks, scores.json, and contact sheets or answers."
)
_WORKS = flags.DEFINE_string("works", None, "Folder of works to score, instead of OUT/works; with --score_only.")
_GENERATE_ONLY = flags.DEFINE_bool("generate_only", False, "Make the works, and leave scoring for later.")
_SCORE_ONLY = flags.DEFINE_bool("score_only", False, "Score works that are there, and use no model.")
_RECONSTRUCT = flags.DEFINE_bool("reconstruct", False, "Short for --suite=NAME:reconstruct, the autoencoder alone.")
_GATES = flags.DEFINE_bool("gates", False, "Exit with 1 unless the scores lie where a checkpoint for RL must lie.")
_BASELINE = flags.DEFINE_string(
    "baseline", None, "scores.json of another model (from its --out): the gates are then to be no worse."
)
_DEFINERS = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def define_options(argv: Sequence[str]) -> None:
    """A flag for each option of the suites that the command line names."""
    from unipic2_jax.evaluation.benchmark import options_of

    asked, ours = suites(argv), set(flags.FLAGS)
    for name in asked:
        for option, told in options_of(name).items():
            if option in ours:
                raise ValueError(
                    f"The benchmark '{name}' has an option '{option}', which is a flag already; rename it."
                )
            if option not in flags.FLAGS:
                define = _DEFINERS.get(told.type, flags.DEFINE_string)
                define(option, None, f"Of --suite={name}: {told.about or option} ({told.default!r} if not given)")


def suites(argv: Sequence[str]) -> list[str]:
    """The names that a command line asks for, before it is parsed."""
    line = " ".join(argv)
    named = re.findall(r"(?:^| )--?suite[ =](\S+)", line)
    names = named[-1].split(",") if named else list(_SUITE.default)
    return [f"{name}:reconstruct" for name in names] if re.search(r" --?reconstruct(=true)?( |$)", line) else names


def main(argv: list[str]) -> None:
    """Prints the scores, and the gates that they miss."""
    del argv
    from unipic2_jax.evaluation import benchmark as library

    names = [f"{name}:reconstruct" if _RECONSTRUCT.value else name for name in _SUITE.value]
    check_flags(names)
    made = {name: library.make_benchmark(name, options(library.options_of(name))) for name in names}
    baseline = made[names[0]].read_baseline(_BASELINE.value) if _BASELINE.value else None
    subject = library.Subject(_MODEL.value, tuple(_LORA.value), _DTYPE.value)
    steps = {"works": _WORKS.value, "generate": not _SCORE_ONLY.value, "score": not _GENERATE_ONLY.value}
    missed: list[str] = []
    for name, benchmark in made.items():
        out = Path(_OUT.value, *([name.replace(":", "-")] if len(names) > 1 else [])) if _OUT.value else None
        report = library.run(benchmark, subject, out, **steps)
        if report:
            print(report.text)
            missed += benchmark.missed(report, baseline)
            for sentence in report.failed:
                print(f"no mark: {sentence}", file=sys.stderr)
    if _GATES.value:
        print("\n".join(["", *missed]) if missed else "\nall gates passed")
        sys.exit(1 if missed else 0)


def options(known: Iterable[str]) -> dict[str, Any]:
    """Those of a suite's options that the command line gives."""
    return {name: flags.FLAGS[name].value for name in known if flags.FLAGS[name].present}


def check_flags(names: Sequence[str]) -> None:
    """Refuses flags that do not go together."""
    if _GENERATE_ONLY.value and (_SCORE_ONLY.value or _GATES.value or not _OUT.value):
        raise ValueError("--generate_only needs --out, and neither --score_only nor --gates goes with it.")
    if _WORKS.value and not _SCORE_ONLY.value:
        raise ValueError("--works names works that are there already; give --score_only with it.")
    if _SCORE_ONLY.value and not (_WORKS.value or _OUT.value):
        raise ValueError("--score_only needs the folder with the works; give --works or --out.")
    if len(names) > 1 and (_WORKS.value or _BASELINE.value):
        raise ValueError("--works and --baseline are for one suite; ask for the suites one after the other.")


if __name__ == "__main__":
    cli.run(main, define_options)
