"""What XLA's compiler for GPUs is told beside its own defaults: one table for runs and for plans.

JAX is not imported here: XLA reads its flags from the environment, once, when the first program of a process is compiled.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import NamedTuple

from unipic2_jax.core.errors import ConfigError, nearest

VARIABLE = "XLA_FLAGS"
# What `config.xla_flags` may be: the flags below, or XLA's own defaults.
CHOICES = ("recipe", "none")


class Flag(NamedTuple):
    """A value, and why it is not XLA's own."""

    value: bool | int | str
    reason: str


# At a flag that it does not know XLA ends the process, so that a name stands here only when JAX 0.10 to 0.12 have it
# (tests/parallel/test_parallel_xla.py compiles with them). docs/runs.md says what was tried and left out.
GPU_FLAGS = {
    "xla_gpu_enable_triton_gemm": Flag(
        False,
        "products by cuBLASLt, with bias and GELU in its epilogue; Triton's leave those to another pass over memory, and their tiles "
        "are tried one by one while a program is compiled",
    ),
}


def gpu_options(choice: str) -> dict[str, bool | int | str]:
    """Flags by name, as compiler options of one program.

    Raises:
      ConfigError: for what is none of `CHOICES`.
    """
    if choice not in CHOICES:
        raise ConfigError(f"config.xla_flags is '{choice}'" + nearest(choice, CHOICES))
    return {name: flag.value for name, flag in GPU_FLAGS.items()} if choice == "recipe" else {}


def set_gpu_flags(choice: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags to $XLA_FLAGS. One that stands there already keeps the value that the user gave it.

    Raises:
      ConfigError: see `gpu_options`.
    """
    given = environment.get(VARIABLE, "")
    named = {word.lstrip("-").split("=")[0] for word in given.split()}
    added = [f"--{name}={_text(value)}" for name, value in gpu_options(choice).items() if name not in named]
    if added:
        environment[VARIABLE] = " ".join([*given.split(), *added])


def _text(value: bool | int | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
