"""What every command shares: mistakes of the person at the keyboard are one sentence on stderr, not a traceback."""

from __future__ import annotations

import logging as python_logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
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
