"""Says what a recipe needs on a machine that is not there: memory, FLOPs, links and time of its real steps.

    python -m launch.plan --config=configs/pdtr.py --topology=v5p:4x4x4 --config.parallel.preset=fsdp

Compiles for TPUs on any machine that has their compiler (`pip install libtpu`); nothing is allocated and no weight is read.
"""

from __future__ import annotations

import os
import sys

from absl import app, flags

from launch import cli
from launch.recipe import CONFIG, parse_flags
from unipic2_jax.training.config import ConfigError

_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips and their arrangement: v5e:8x8, v5p:4x4x4, v6e:8x8.")
flags.mark_flags_as_required(["topology"])


def main(argv: list[str]) -> None:
    """Prints the table, and what to change where it does not fit."""
    if len(argv) > 1:
        sys.exit(f"The argument {argv[1]} is not a flag; write --config.field=value.")
    cli.quiet()
    # Nothing runs here; and the TPU compiler is not to look for a TPU.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
    from unipic2_jax.training import config as config_lib
    from unipic2_jax.training import plan

    try:
        config = config_lib.validate(CONFIG.value)
        topology = plan.read_topology(_TOPOLOGY.value)
        costs = plan.plan(config, topology)
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"{topology.name}: {topology.count} chips, the mesh {config.parallel.preset}; everything per chip\n")
    print(plan.table(costs, topology))
    for sentence in plan.advice(config, costs, topology):
        print(sentence)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
