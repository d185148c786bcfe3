"""Programs that are compiled beside the training, before their first use."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from unipic2_jax.parallel.compat import use_mesh


class BackgroundCompiler:
    """Compiles jitted functions in a thread, one after the other in the order in which they were asked for."""

    def __init__(self, mesh: jax.sharding.Mesh, log: Callable[[str], None]):
        self.mesh, self.log = mesh, log
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self.programs: dict[Hashable, Future[Any]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self.programs

    def ask(self, key: Hashable, name: str, function: Any, *arguments: Any, **keywords: Any) -> None:
        """Begins with `function` for these arguments, arrays or descriptions of some; nothing when `key` was asked for before."""
        if key not in self.programs:
            described = jax.tree.map(_described, arguments)
            self.programs[key] = self.thread.submit(self._compile, name, function, described, keywords)

    def __getitem__(self, key: Hashable) -> Any:
        """The compiled function that was asked for as `key`; waits for it, and raises what went wrong with it."""
        return self.programs[key].result()

    def close(self) -> None:
        """What has not been begun never will be."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, name: str, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        started = time.perf_counter()
        with use_mesh(self.mesh):  # each thread has its own
            compiled = function.lower(*arguments, **keywords).compile()
        self.log(f"compiled {name} in {time.perf_counter() - started:.1f} s")
        return compiled


def _described(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place; an array that may be moved to wherever it is needed has no place of its own."""
    place = leaf.sharding if getattr(leaf, "committed", True) and hasattr(leaf, "sharding") else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
