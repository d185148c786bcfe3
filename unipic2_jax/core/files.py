"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, whenever the process dies."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
