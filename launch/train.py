"""Trains: `python -m launch.train --config=configs/pdtr.py:tiny --workdir=runs/pdtr`. The same command continues a run.

Any field can be overridden: `--config.stages.edit.steps=10 --config.schedule="('t2i','edit')"`.
"""

from __future__ import annotations

import os
import re
import sys

from absl import app, flags
from ml_collections import config_flags

from launch import cli
from unipic2_jax.training.config import ConfigError, unknown_override

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file of configs/, with ':variant' after its name.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is continued when it holds one.")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 1, "Devices that a CPU is treated as, for data parallelism: one a core trains faster.", lower_bound=1
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Join other processes: where the environment names some, always, never.",
)
flags.mark_flags_as_required(["config", "workdir"])


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with one sentence for each way in which it can fail."""
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.keys()  # a recipe that could not be read says so only when it is touched
        return rest
    except flags.Error as error:
        sys.exit(str(error).split("\n")[0])
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(_sentence(argv, error))


def _sentence(argv: list[str], error: Exception) -> str:
    """What is wrong with the command line or the recipe."""
    if isinstance(error, ConfigError):
        return str(error)
    recipe = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), None)
    if recipe:
        try:
            config = config_flags.config_flags.ConfigFileFlagParser("config").parse(recipe)
            for argument in argv:
                found = re.match(r"--?(?:no)?config\.([^=]+)", argument)
                sentence = found and unknown_override(config, found[1])
                if sentence:
                    return sentence
        except Exception as failure:
            return f"The recipe {recipe} cannot be read: {_last_line(failure)}"
    return _last_line(error)


def _last_line(error: Exception) -> str:
    """The last line of an error, where ml_collections puts the cause."""
    return str(error).strip().split("\n")[-1]


def main(argv: list[str]) -> None:
    """Runs the recipe."""
    if len(argv) > 1:
        sys.exit(f"The argument {argv[1]} is not a flag; write --config.field=value.")
    cli.quiet()
    import jax

    from unipic2_jax.parallel import processes
    from unipic2_jax.training import loop

    jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    try:
        processes.initialize(_DISTRIBUTED.value)
    except ValueError as error:
        sys.exit(str(error))
    try:
        loop.run(_CONFIG.value, _WORKDIR.value)
    except (ConfigError, loop.TrainingError, FileNotFoundError) as error:
        sys.exit(str(error))
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # Not sys.exit: leaving in order would wait for the process that is gone.
        print(
            f"Process {jax.process_index()} lost another process of this run ({str(error).splitlines()[0][:200]}); start all of "
            "them again with the same command, in any number: the run goes on from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(processes.LOST_PEER)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
