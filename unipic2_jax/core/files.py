"""Files that are whole or not there, lists that grow line by line, and JSON that people read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def user_cache(name: str) -> Path:
    """Where a folder of this project is among the user's caches: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unipic2_jax" / name


def write_bytes(path: Path, content: bytes, durable: bool = False) -> None:
    """Writes a file that is either the old one or the new one, whenever the process dies.

    Args:
      durable: wait until it is on the disk, which survives a power cut too.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(part, path)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode(), durable)


def to_text(values: Mapping[str, Any]) -> str:
    """The values as indented JSON."""
    return json.dumps(values, indent=2) + "\n"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes indented JSON, whole or not at all, into a folder that is made when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_text(values))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a list's whole lines; none where there is no file. A line that a kill cut in half is passed over."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds a line for each, on the disk when this returns; half a line at the end of the file is cut off before."""
    with open(path, "a+b") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
