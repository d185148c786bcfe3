"""What every command shares: mistakes of the person at the keyboard are one sentence on stderr, not a traceback."""

from __future__ import annotations

import ctypes
import logging as python_logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from absl import app, flags, logging

OURS = tuple(
    str(Path(__file__).resolve().parents[1] / name) for name in ("unipic2_jax", "launch", "convert", "configs")
)

flags.DEFINE_bool("traceback", False, "Show the full traceback of an error that would otherwise be one sentence.")


def quiet() -> None:
    """Keeps libraries from telling what they did not find (accelerators, PyTorch); call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.WARNING)


class _AboveTheBar(python_logging.Handler):
    """Lines above a progress bar instead of through it."""

    def emit(self, record: python_logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Shows what this project logs, such as which kernel computes attention and why."""
    logger = python_logging.getLogger("unipic2_jax")
    logger.setLevel(python_logging.INFO)
    logger.propagate = False
    logger.handlers = [_AboveTheBar()]


def keep_freed_memory() -> None:
    """Where JAX has nothing but a CPU, and the C library is glibc: what XLA frees stays with the process.

    Every execution of a compiled program asks for its temporary memory anew, and the system clears what it gives page by page,
    which can take as long as a training step's arithmetic (docs/performance.md). Call it in a process of its own and before JAX
    looks for devices, which is when it starts its threads. Hosts of accelerators are left alone: their many threads would wait
    for each other in the one arena that large blocks need.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is None or not _has_only_cpus():
        return
    # Of glibc's malloc.h: no block is mapped for itself, nothing is given back, and threads share the arena that can grow.
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (arena_max, 1)):
        change(parameter, value)


def _has_only_cpus() -> bool:
    """Whether JAX will find no accelerator: it asks the plugins that are installed, unless $JAX_PLATFORMS says which."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (entry_points(group="jax_plugins") or find_spec("jax_plugins") or find_spec("libtpu"))


def is_user_error(error: BaseException) -> bool:
    """Whether `error` is about what the user passed: a file-system error, or a ValueError that this project raised.

    A ValueError from inside a library is a bug of ours and keeps its traceback.
    """
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and frames[-1].filename.startswith(OURS)


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs `main(argv)` under absl; an error of input ends with its sentence on stderr and exit code 2."""

    def guarded(argv: Sequence[str]) -> None:
        quiet()
        try:
            if len(argv) > 1:
                raise ValueError(f"Unexpected argument {argv[1]!r}: every value needs its flag; see --help.")
            main(argv)
        except KeyboardInterrupt:
            sys.exit(130)
        except (OSError, ValueError) as error:
            if flags.FLAGS.traceback or not is_user_error(error):
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)
