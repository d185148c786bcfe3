"""Compiles every program of the full-size recipes for the machines that they are meant for, and fails when one does not compile or fit.

    python -m launch.plan_check

What was compiled before is read from the cache of `launch.plan`, so that it goes on where it was interrupted. The tables of
docs/scaling.md are made anew.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from absl import flags

from launch import cli
from unipic2_jax.core.errors import ConfigError

_RECIPES = flags.DEFINE_list("recipes", None, "Of configs/; all full-size ones by default.")
_MACHINES = flags.DEFINE_list(
    "machines", None, "As --topology of launch.plan; all that can be compiled for by default."
)
_JOBS = flags.DEFINE_integer("jobs", os.cpu_count(), "Recipes on machines at the same time; each takes 3 GB of memory.")
_CACHE = flags.DEFINE_string("cache", None, "As --cache of launch.plan.")
_WRITE = flags.DEFINE_bool("write", True, "Write docs/scaling.md and docs/scaling_tables.md.")


def main(argv: list[str]) -> None:
    """Prints the table, and what is wrong."""
    del argv
    cli.quiet()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.pop("XLA_FLAGS", None)
    from unipic2_jax.perf import compiler, plan, plan_check, plan_report

    cache = compiler.default_cache() if _CACHE.value is None else _CACHE.value
    try:
        units = [(r, m) for m in _MACHINES.value or plan_check.machines() for r in _RECIPES.value or plan_check.RECIPES]
    except ConfigError as error:
        sys.exit(str(error))
    checked = []
    for unit in plan_check.check_all(units, str(cache), _JOBS.value):
        checked.append(unit)
        print(unit.row or "\n".join(unit.problems), file=sys.stderr, flush=True)
    print("\n".join([plan_report.SUMMARY, *(unit.row for unit in checked if unit.row)]))
    for kind in plan.CALIBRATION:
        if ratios := [ratio for unit in checked for kind_of_ratio, ratio in unit.ratios if kind_of_ratio == kind]:
            low, middle, high = np.percentile(ratios, (0, 50, 100))
            print(
                f"Compiled activations, in parts of the counted ones, {kind}: {low:.2f} to {high:.2f}, median {middle:.2f}."
            )
    if problems := [sentence for unit in checked for sentence in unit.problems]:
        sys.exit("\n".join(problems))
    if _WRITE.value:
        plan_check.document(checked, Path("docs/scaling.md"), Path("docs/scaling_tables.md"))


if __name__ == "__main__":
    cli.run(main, compiles=False)
