"""Which files a source is made of."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from unipic2_jax.core.addresses import fetched_files, is_address

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def find_files(path: Paths, *suffixes: str, beside: bool = False) -> list[Path]:
    """The files that `path` names, in order: a file, a folder (what has one of the suffixes below it), a glob with `*`, `?`
    or `**`, or a list of these. Of an address they are local copies.

    Args:
      beside: copy all that lies in the folder too, as pictures that a manifest names.

    Raises:
      FileNotFoundError: when there is no such file or folder, or nothing that matches a glob.
      ValueError: when a folder or a list is empty.
    """
    if is_address(path):
        return find_files(fetched_files(path, suffixes, beside), *suffixes)
    if not isinstance(path, (str, os.PathLike)):
        files = [file for part in path for file in find_files(part, *suffixes, beside=beside)]
    elif os.path.isdir(path := os.path.expanduser(path)):
        files = visible_files(path, *suffixes)
    elif os.path.isfile(path):
        return [Path(path)]
    elif not (files := [Path(name) for name in sorted(glob.glob(path, recursive=True)) if os.path.isfile(name)]):
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    if not files:
        raise ValueError(f"There is no {' or '.join(suffixes)} file in {path}; name a folder that has some.")
    return files


def visible_files(folder: str | os.PathLike[str], *suffixes: str) -> list[Path]:
    """The files below a folder that end so, whatever the case, sorted by name; what is hidden by a leading dot is not seen."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, n) for n in names if n.lower().endswith(suffixes) and not n.startswith(".")]
    return sorted(files)
