"""The device mesh, and where arrays live on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A data-parallel mesh over `devices` (all of them by default), one axis called 'data'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over 'data'."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split(mesh: Mesh, abstract: Any) -> Any:
    """Shardings for a tree of parameters too large for one device: each leaf is split along its longest axis that the
    devices divide, and replicated when there is none.
    """
    size = mesh.shape["data"]

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(place, abstract)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a pytree of host arrays on the mesh, split along their leading axis.

    Raises:
      ValueError: when a leading axis is not a multiple of the number of devices.
    """
    size = mesh.shape["data"]

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        if x.shape[0] % size:
            raise ValueError(f"A batch of {x.shape[0]} cannot be split over {size} devices; use a multiple of {size}.")
        return jax.device_put(x, batch_sharding(mesh))

    return jax.tree.map(place, batch)
