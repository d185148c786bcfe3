"""Which networks stay on the device between their uses. A model's text encoders are larger than its transformer, and read a call's
prompts once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# What stays: every network, or the transformer alone.
RESIDENT = ("all", "transformer")
# The parts of a model's parameters that may leave.
PARTS = ("conditioner", "vae")


class Residence:
    """Moves the parts of a model's parameters between host and device.

    Attributes:
      resident: one of RESIDENT.
    """

    def __init__(self, resident: str, params: dict[str, Any]):
        """Remembers where the parts of `params` lie.

        Raises:
          ValueError: for an unknown choice.
        """
        if resident not in RESIDENT:
            raise ValueError(f"resident is {resident!r}; choose one of {', '.join(map(repr, RESIDENT))}.")
        self.resident = resident
        self._places = {part: _places(params[part]) for part in PARTS}

    @property
    def moves(self) -> bool:
        """Whether anything leaves the device."""
        return self.resident != "all"

    def released(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters, with those that do not stay on the host. What was on the device is free once nobody else holds it."""
        return {**params, **{part: jax.device_get(params[part]) for part in PARTS}} if self.moves else params

    @contextlib.contextmanager
    def on_device(self, part: str, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """`params` with a part of them on the device while they are used; what was put there for it is then given back."""
        if not any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params[part])):
            yield params
            return
        placed = jax.device_put(params[part], self._places[part])
        try:
            yield {**params, part: placed}
        finally:
            for leaf in jax.tree.leaves(placed):
                leaf.delete()


def _places(tree: Any) -> Any:
    """How the leaves lie on devices; None, which is the default device, for those of the host."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.map(lambda x: x.sharding, tree) if all(isinstance(x, jax.Array) for x in leaves) else None
