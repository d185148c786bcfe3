"""JSON as its standard has it. Python's reader also takes NaN and keys that come twice, and makes infinity of 1e999."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: with a clause that says what is wrong with it.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repetition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def read_object(file: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the file.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}; copy it from the original checkpoint.")
    try:
        values = read_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object; copy it again.")
    return values


def as_number(value: Any) -> float | None:
    """A finite number as float; None for anything else, true and false too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int beyond the largest float
        return None


def excerpt(text: str | bytes, length: int = 120) -> str:
    """The beginning of a text on one line, for messages."""
    if isinstance(text, bytes):
        text = text[: 4 * length].decode("utf-8", "replace")
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not have")


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a key twice")
    return values
