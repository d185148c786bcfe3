"""Parameters that several processes hold in parts, written by one: a row at a time, so that none of them ever has the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from unipic2_jax.parallel.processes import is_main, max_over_processes, to_host

END, WHOLE = 0, 0  # what the main process asks for: nothing more; of a leaf, all of it instead of a row


class Streamed:
    """A leaf of a tree as the main process sees it: what is read of it is gathered from all processes then, and not kept.

    Attributes:
      shape, dtype: of the leaf.
    """

    def __init__(self, leaf: jax.Array, read: Callable[[int], np.ndarray]):
        self.shape, self.dtype, self._read = leaf.shape, leaf.dtype, read

    def __getitem__(self, index: Any) -> np.ndarray:
        """A row of the leading axis costs that row; anything else the whole leaf."""
        if isinstance(index, int | np.integer) and 0 <= index < self.shape[0]:
            return self._read(int(index) + 1)
        return self._read(WHOLE)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._read(WHOLE)
        return array if dtype is None else array.astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return jax.numpy.asarray(self._read(WHOLE))


def streamed(params: Any, write: Callable[[Any], None]) -> None:
    """Lets the main process `write` a tree whose leaves it may read with NumPy, and the others give it what it reads of theirs.

    All processes call this at the same place. With one process `write` gets the tree itself.
    """
    if jax.process_count() == 1:
        write(params)
        return
    leaves, structure = jax.tree.flatten(params)

    def gathered(number: int, row: int) -> np.ndarray:
        leaf = leaves[number]
        return to_host(leaf if row == WHOLE else leaf[row - 1])

    if not is_main():
        while (number := max_over_processes(END)) != END:
            gathered(number - 1, max_over_processes(WHOLE))
        return

    def reader(number: int) -> Callable[[int], np.ndarray]:
        def read(row: int) -> np.ndarray:
            max_over_processes(number + 1)
            max_over_processes(row)
            return gathered(number, row)

        return read

    try:
        write(structure.unflatten([Streamed(leaf, reader(number)) for number, leaf in enumerate(leaves)]))
    finally:
        max_over_processes(END)
