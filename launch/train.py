"""Trains: `python -m launch.train --config=configs/pdtr.py:tiny --workdir=runs/pdtr`. The same command continues a run.

Any field can be overridden: `--config.stages.edit.steps=10 --config.schedule="('t2i','edit')"`.
"""

from __future__ import annotations

import sys

from absl import app, flags

from launch import cli
from launch.recipe import CONFIG, parse_flags
from unipic2_jax.core.errors import ConfigError

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder or address (gs://...) of the run; it is continued when it holds one."
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 1, "Devices that a CPU is treated as, for data parallelism: one a core trains faster.", lower_bound=1
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Join other processes: where the environment names some, always, never.",
)
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> None:
    """Runs the recipe."""
    if len(argv) > 1:
        sys.exit(f"The argument {argv[1]} is not a flag; write --config.field=value.")
    cli.quiet()
    cli.show_log()
    cli.keep_freed_memory()
    try:
        cli.tell_compiler(CONFIG.value.xla_flags)
    except ConfigError as error:
        sys.exit(str(error))
    import jax

    from unipic2_jax.parallel import processes
    from unipic2_jax.perf import opening, split
    from unipic2_jax.training import loop

    with processes.ending():
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
        try:
            processes.initialize(_DISTRIBUTED.value)
        except ValueError as error:
            sys.exit(str(error))
        config, platform = CONFIG.value, (jax.default_backend(), jax.config.jax_platforms)
        accelerator = cli.find_accelerator()
        if refused := cli.unused_accelerator(config.model, (config.init, config.vlm), *platform, accelerator):
            sys.exit(refused)
        try:
            with processes.together():
                loop.run(config, _WORKDIR.value, split=split.resolved, opening=opening.table, own_process=True)
        except (ConfigError, loop.TrainingError, FileNotFoundError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
