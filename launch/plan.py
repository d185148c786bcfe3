"""Says what a recipe needs on machines that are not there: memory, FLOPs, links and time of its real steps.

    python -m launch.plan --config=configs/pdtr.py --topology=v5p:4x4x4
    python -m launch.plan --config=configs/kontext.py --topology=gpu:8xh200,gpu:16xh100

Programs are compiled for the chips on any machine that has their compiler (`pip install -r requirements-cuda.txt`, or
`requirements-tpu.txt`); without it GPUs are counted. Nothing is allocated and no weight is read. docs/scaling.md says how to read the table.
"""

from __future__ import annotations

import os
import shlex
import sys

from absl import app, flags

from launch import cli
from launch.recipe import CONFIG, parse_flags
from unipic2_jax.core.errors import ConfigError

_TOPOLOGY = flags.DEFINE_list("topology", None, "Chips: v5e:8x8, v5p:4x4x4, v6e:8x8, gpu:8xh200; several with commas.")
_ALL_SHAPES = flags.DEFINE_bool(
    "all_shapes",
    False,
    "Every resolution and aspect ratio, instead of the last resolution's square, where memory is decided.",
)
_SMALLEST = flags.DEFINE_enum(
    "smallest",
    "estimate",
    ["estimate", "confirm", "off"],
    "The smallest slice that fits: by scaling, or compiled for it.",
)
_CACHE = flags.DEFINE_string(
    "cache",
    None,
    "Folder that remembers what compiled programs take; empty: none. By default $JAX_COMPILATION_CACHE_DIR/plans or "
    "~/.cache/unipic2_jax/plans.",
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "The splits and the parts of a batch that fit, by arithmetic and fastest first, instead of one plan.",
)
_MOVERS = flags.DEFINE_integer("movers", 0, "So many of the largest movers of memory of every compiled program.")
_EFFORT = flags.DEFINE_enum(
    "effort",
    "quick",
    ["quick", "run"],
    "How hard the compiler for TPUs tries: 'run' as in a run, in four times the time, which decides what moves memory.",
)
_COUNT = flags.DEFINE_bool("count", False, "By arithmetic also where there is a compiler.")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "For a document: the command comes before its table.")
flags.mark_flags_as_required(["topology"])


def parse(argv: list[str]) -> list[str]:
    """The flags, with JAX on the CPU: reading a recipe imports it, and later it does not look at the environment again."""
    # Nothing runs here: the TPU compiler is not to look for a TPU, and other processes may use it at the same time.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    # At a flag of another platform's compiler it ends the process.
    os.environ.pop("XLA_FLAGS", None)
    return parse_flags(argv)


def main(argv: list[str]) -> None:
    """Prints a table for each topology, the smallest slice that fits, and what to change where nothing does."""
    if len(argv) > 1:
        sys.exit(f"The argument {argv[1]} is not a flag; write --config.field=value.")
    cli.quiet()
    from unipic2_jax.perf import compiler, plan, plan_report, split, topology
    from unipic2_jax.training import config as config_lib

    cache = compiler.Cache(compiler.default_cache() if _CACHE.value is None else _CACHE.value, _EFFORT.value)
    log = lambda sentence: print(sentence, file=sys.stderr, flush=True)
    try:
        given = config_lib.validate(CONFIG.value)
        for machine in (topology.read_topology(name, given.parallel.slices) for name in _TOPOLOGY.value):
            if _SEARCH.value:
                print(f"**{machine}**, {machine.count} chips (by arithmetic):\n")
                print("\n".join(split.table(split.searched(given, machine, log), machine)), end="\n\n")
                continue
            config = given
            if given.parallel.preset == config_lib.AUTO or config_lib.left_to_plan(given):
                config = split.settled(given, machine, log)
            made = plan.plan(config, machine, all_shapes=_ALL_SHAPES.value, cache=cache, log=log, count=_COUNT.value)
            compiled = topology.has_compiler(machine) and not _COUNT.value
            print(f"**{machine}**, {machine.count} chips, {split.described(config)}", end="")
            print(f" ({'compiled' if compiled else 'by arithmetic'}):\n")
            if not compiled and not _COUNT.value:
                log(
                    f"JAX's CUDA plugin is not installed, so {machine} is counted: pip install -r requirements-cuda.txt"
                )
            if _MARKDOWN.value:
                print(f"    {_command(machine.name)}\n")
            print(plan_report.table(made.costs, machine))
            if _MOVERS.value:
                print(plan_report.movers(made.costs, _MOVERS.value))
            for sentence in (*plan_report.kernels(made), *plan_report.advice(config, made.costs, machine)):
                print(f"{sentence}\n")
            if _SMALLEST.value != "off":
                print(plan_report.smallest_sentence(config, made, machine, _SMALLEST.value, cache, log), end="\n\n")
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(str(error))
    if not _ALL_SHAPES.value:
        log("Each flow stage at its last resolution and square pictures; --all_shapes plans the others too.")


def _command(machine: str) -> str:
    """What was typed, for one topology."""
    given = [a for a in sys.argv[1:] if not a.startswith(("--topology", "--cache", "--markdown", "--smallest"))]
    return shlex.join(["python", "-m", "launch.plan", *given, f"--topology={machine}"])


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
