"""The flag --config of the commands that take a recipe, with one sentence for each way in which it can be wrong."""

from __future__ import annotations

import re
import sys

from absl import flags
from ml_collections import config_flags

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.training.config import unknown_override

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file of configs/, with ':variant' after its name.")
flags.mark_flag_as_required("config")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with one sentence for each way in which it can fail."""
    try:
        rest = flags.FLAGS(argv)
        CONFIG.value.keys()  # a recipe that could not be read says so only when it is touched
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
                match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
                sentence = match and unknown_override(config, match[1])
                if sentence:
                    return sentence
        except Exception as failure:
            return f"The recipe {recipe} cannot be read: {_last_line(failure)}"
    return _last_line(error)


def _last_line(error: Exception) -> str:
    """The last line of an error, where ml_collections puts the cause."""
    return str(error).strip().split("\n")[-1]
