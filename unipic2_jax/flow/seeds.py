"""Seeds are whole numbers of any sign and size; they mean the same wherever they are given."""

from __future__ import annotations

import operator
from typing import Any

RANGE = 2**32


def folded(seed: Any, name: str = "seed") -> int:
    """The seed that a whole number stands for: its remainder modulo 2**32, so that 0 to 2**32 - 1 are themselves.

    Raises:
      ValueError: for what is no whole number, with its name.
    """
    try:
        return operator.index(seed) % RANGE
    except TypeError:
        raise ValueError(f"{name} is {seed!r}, and it must be a whole number.") from None
