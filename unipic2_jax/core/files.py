"""Files that are whole or not there, and JSON that people read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Writes a file that is either the old one or the new one, whenever the process dies.

    Args:
      durable: wait until it is on the disk, which survives a power cut too.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, path)


def to_text(values: Mapping[str, Any]) -> str:
    """As indented JSON."""
    return json.dumps(values, indent=2) + "\n"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes indented JSON, whole or not at all, into a folder that is made when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_text(values))
