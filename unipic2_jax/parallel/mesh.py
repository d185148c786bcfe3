"""The device mesh, and where arrays live on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unipic2_jax.parallel.compat import auto_axes, current_mesh, mesh_utils
from unipic2_jax.parallel.rules import RULES, devices_along

AXES = ("data", "fsdp", "tensor", "sequence")
# Preset -> the sizes of its mesh; -1 takes all devices that the others leave.
PRESETS: dict[str, dict[str, int]] = {
    "ddp": {"data": -1},  # every device has all parameters
    "fsdp": {"fsdp": -1},  # parameters and optimizer are split, and gathered a layer at a time
    "fsdp_tp": {"fsdp": -1, "tensor": 2},  # heads and hidden layers are split too
    "fsdp_sp": {"fsdp": -1, "sequence": 2},  # the tokens of a sample are split too
}


def mesh_sizes(devices: int, preset: str = "ddp", sizes: Mapping[str, int] | None = None, slices: int = 1) -> list[int]:
    """Devices along each of `AXES`.

    Args:
      devices: all of them.
      preset: one of `PRESETS`.
      sizes: axis -> size, over the preset's own; 0 leaves the preset's.
      slices: groups of devices with slow links between them; they are along 'data', whose size they divide.

    Raises:
      ValueError: for an unknown preset or axis, or sizes that do not multiply to `devices`.
    """
    if preset not in PRESETS:
        raise ValueError(f"The parallel preset '{preset}' does not exist; choose one of {', '.join(PRESETS)}.")
    given = {axis: size for axis, size in (sizes or {}).items() if size}
    if unknown := [axis for axis in given if axis not in AXES]:
        raise ValueError(f"The mesh has no axis '{unknown[0]}'; it has {', '.join(AXES)}.")
    wanted = {**dict.fromkeys(AXES, 1), "data": slices, **PRESETS[preset], **given}
    rest = [axis for axis in AXES if wanted[axis] < 0]
    fixed = math.prod(size for size in wanted.values() if size > 0)
    if len(rest) == 1 and devices % fixed == 0:
        wanted[rest[0]] = devices // fixed
    found = " x ".join(f"{axis} {wanted[axis]}" for axis in AXES)
    if min(wanted.values()) < 1 or math.prod(wanted.values()) != devices:
        raise ValueError(f"The mesh '{preset}' of {found} does not fit {devices} devices; choose other sizes.")
    if wanted["data"] % slices:
        raise ValueError(f"{slices} slices do not divide the data axis of {found}; make parallel.data a multiple.")
    return [wanted[axis] for axis in AXES]


def make_mesh(
    devices: Sequence[jax.Device] | None = None,
    preset: str = "ddp",
    sizes: Mapping[str, int] | None = None,
    slices: int = 1,
) -> Mesh:
    """A mesh with the axes `AXES` over `devices` (all of them by default); see `mesh_sizes`.

    Several slices (TPU pods joined by a data-centre network) become the outer part of 'data', so that only gradients
    cross it.

    Raises:
      ValueError: when sizes do not fit the devices, or the devices are of another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_sizes(len(devices), preset, sizes, slices)
    types = auto_axes(len(AXES))
    if slices == 1:
        # An axis goes along an edge of the torus where it can, and along a part of one where it must.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    inside = [shape[0] // slices, *shape[1:]]
    # Where devices do not say which slice they are of, a process is one.
    by_process = not hasattr(devices[0], "slice_index")
    groups = {device.process_index if by_process else device.slice_index for device in devices}
    if len(groups) != slices:
        raise ValueError(
            f"{slices} slices are asked for and the devices are of {len(groups)}; set parallel.slices={len(groups)}."
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1, 1), devices, process_is_granule=by_process, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return devices_along(mesh, RULES.batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is the batch."""
    return NamedSharding(mesh, RULES.spec("batch"))


def described_rows(tree: Any, rows: int, mesh: Mesh) -> Any:
    """Host arrays of a few rows as descriptions of a batch of `rows`, split over the mesh, or whole where that is uneven."""
    place = batch_sharding(mesh) if rows % batch_shards(mesh) == 0 else replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), x.dtype, sharding=place), tree)


def described_whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays or descriptions as descriptions of arrays that every device has."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises a ValueError when a batch of so many rows cannot be split evenly."""
    if rows % (parts := batch_shards(mesh)):
        raise ValueError(f"A batch of {rows} cannot be split over {parts} devices; use a multiple of {parts}.")


def shard_batch(batch: Any, mesh: Mesh, *, local: bool = False) -> Any:
    """Places a pytree of host arrays on the mesh, split along their leading axis.

    Args:
      local: the arrays hold the rows of this process alone, in the order of `processes.local_rows`, not the whole batch.

    Raises:
      ValueError: when a leading axis cannot be split evenly.
    """

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        if local and jax.process_count() > 1:
            return jax.make_array_from_process_local_data(batch_sharding(mesh), x)
        check_rows(x.shape[0], mesh)
        if jax.process_count() > 1:
            return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])
        return jax.device_put(x, batch_sharding(mesh))

    return jax.tree.map(place, batch)


def platform() -> str:
    """What programs traced here will run on: 'cpu', 'gpu' or 'tpu'; of a mesh in use its devices', which need not be there."""
    device = current_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
