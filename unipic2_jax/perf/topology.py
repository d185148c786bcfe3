"""The chips that a plan is made for, and how many of them are rented together."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.parallel.compat import AbstractMesh, auto_axes, topologies
from unipic2_jax.parallel.mesh import AXES, make_mesh, mesh_sizes
from unipic2_jax.training.config import mesh_fields

GB = 1e9
NODE = 8  # GPUs that NVLink joins
# Bytes a second and GPU between nodes: one InfiniBand port of 400 Gb/s each, as in NVIDIA's own machines.
NETWORK = 50e9
# What JAX allocates of a GPU's memory when it starts, unless the environment says otherwise.
POOL, POOL_VARIABLE = 0.75, "XLA_PYTHON_CLIENT_MEM_FRACTION"
# How XLA's GPU compiler is told of a chip that is not there.
TARGETS = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of a chip.

    Attributes:
      memory: bytes of it.
      flops: of matrix products of bfloat16, a second; flops32: of float32 at JAX's default precision.
      bandwidth: of its memory, bytes a second.
      link: to the other chips of a slice or node, bytes a second in one direction, all links together.
    """

    memory: float
    flops: float
    flops32: float
    bandwidth: float
    link: float


# Google Cloud's pages of the TPU versions; their links are given there in both directions together (v5e 400, v6e 800 GB/s)
# or as 4800 Gb/s in one (v5p). Memory is what the compiler lets a program have. A TPU multiplies float32 as bfloat16 unless
# told otherwise. NVIDIA's data sheets (SXM, dense); a GPU multiplies float32 as TF32; its memory is what its driver reports.
CHIPS = {
    "v5e": Chip(15.75 * 2**30, 197e12, 197e12, 819e9, 200e9),
    "v5p": Chip(95.74 * 2**30, 459e12, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.25 * 2**30, 918e12, 918e12, 1638e9, 400e9),
    "h100": Chip(84_942_979_072, 989e12, 494e12, 3350e9, 450e9),
    "h200": Chip(151_397_597_184, 989e12, 494e12, 4800e9, 450e9),
    "b200": Chip(191_514_411_008, 2250e12, 1125e12, 7670e9, 900e9),
}
GPUS = ("h100", "h200", "b200")

# What JAX calls a device that is there -> which of CHIPS it is; the first that its name begins with.
KINDS = (
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU v6e", "v6e"),
    ("NVIDIA H100 80GB", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA B200", "b200"),
)


def find_chip(device: jax.Device) -> Chip | None:
    """The data sheet of a device, or None where there is none, as of a CPU."""
    return next((CHIPS[name] for start, name in KINDS if device.device_kind.startswith(start)), None)


# Larger and larger slices of each kind, as they are rented.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    **dict.fromkeys(GPUS, ("1", "2", "4", "8", "16", "32", "64", "128")),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that a run would have.

    Attributes:
      name: of one slice, as it was asked for.
      kind: of `CHIPS`.
      count: of all chips.
      slices: of TPUs, which a data-centre network joins.
    """

    name: str
    kind: str
    count: int
    slices: int = 1

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def chip(self) -> Chip:
        """One of them."""
        return CHIPS[self.kind]

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU slice."""
        return self.kind not in GPUS

    @property
    def nodes(self) -> int:
        """Groups of chips with a network between them, beside the slices of TPUs."""
        return 1 if self.is_tpu else -(-self.count // NODE)

    @property
    def memory(self) -> float:
        """Bytes of a chip that programs can have: on a GPU those of JAX's pool."""
        if self.is_tpu:
            return self.chip.memory
        return self.chip.memory * float(os.environ.get(POOL_VARIABLE) or POOL)

    def crossing(self, mesh: AbstractMesh, axes: Sequence[str]) -> int:
        """How many chips of one node are in a group along these axes of a mesh that reaches over several nodes; 0: none does."""
        if self.nodes == 1:
            return 0
        numbers = np.arange(self.count).reshape(list(mesh.shape.values()))
        group = numbers[tuple(slice(None) if axis in axes else 0 for axis in mesh.shape)].ravel() // NODE
        return 0 if len(set(group)) == 1 else int(np.bincount(group)[group].min())

    def larger(self) -> Iterator[Topology]:
        """All slices of its kind, from the smallest."""
        for shape in SLICES[self.kind]:
            yield read_topology(f"{self.kind}:{shape}" if self.is_tpu else f"gpu:{shape}x{self.kind}", self.slices)

    def abstract_mesh(self, parallel: ConfigDict) -> AbstractMesh:
        """The mesh of `config.parallel` without devices, which is enough to say how arrays are split.

        Raises:
          ConfigError: when it does not come out even.
        """
        preset, sizes, slices = mesh_fields(parallel)
        if self.is_tpu and slices != self.slices:
            raise ConfigError(f"config.parallel.slices is {slices} and the topology is {self}; make them equal.")
        try:
            shape = mesh_sizes(self.count, preset, sizes, slices)
        except ValueError as error:
            raise ConfigError(f"config.parallel on {self}: {error}") from error
        return AbstractMesh(tuple(shape), AXES, axis_types=auto_axes(len(AXES)))

    def mesh(self, parallel: ConfigDict) -> Mesh:
        """The mesh of `config.parallel` over devices that are not there.

        Raises:
          ConfigError: when it does not come out even, or nothing can be compiled here.
        """
        self.abstract_mesh(parallel)
        return make_mesh(tpu_devices(self) if self.is_tpu else gpu_devices(self), *mesh_fields(parallel))


def read_topology(text: str, slices: int = 1) -> Topology:
    """'v5p:4x4x4' or 'gpu:8xh200'.

    Args:
      slices: how many of a TPU slice there are. Of GPUs all are named.

    Raises:
      ConfigError: for anything else.
    """
    kind, _, shape = text.partition(":")
    if kind == "gpu" and (match := re.fullmatch(r"([1-9]\d*)x(\w+)", shape)):
        if match[2] not in GPUS:
            raise ConfigError(
                f"The chip '{match[2]}' of the topology '{text}' is unknown; there are {', '.join(GPUS)}, and another one is a "
                f"row of CHIPS and a file in {TARGETS.relative_to(TARGETS.parents[2])}."
            )
        if int(match[1]) > NODE and int(match[1]) % NODE:
            raise ConfigError(f"The topology '{text}' is not made of whole nodes; take a multiple of {NODE} GPUs.")
        return Topology(text, match[2], int(match[1]))
    if kind in CHIPS and kind not in GPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        return Topology(text, kind, slices * math.prod(map(int, shape.split("x"))), slices)
    raise ConfigError(
        f"The topology '{text}' is unknown; write v5p:4x4x4, v5e:8x8, v6e:8x8, gpu:8xh100, gpu:8xh200 or gpu:8xb200."
    )


def of_devices(devices: Sequence[jax.Device]) -> Topology:
    """The topology of devices that are there.

    Raises:
      ConfigError: when there is no data sheet of them.
    """
    kind = next((name for start, name in KINDS if devices[0].device_kind.startswith(start)), None)
    if kind is None:
        raise ConfigError(
            f"There is no data sheet of a {devices[0].device_kind}, and so no split of its own; choose one: "
            "--config.parallel.preset=fsdp, or ddp."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return Topology(f"{len(devices)} x {kind}", kind, len(devices), slices)


def has_compiler(topology: Topology) -> bool:
    """Whether programs for it can be compiled here; for a TPU slice `tpu_devices` says what is missing."""
    return topology.is_tpu or bool(importlib.util.find_spec("jax_plugins") and _cuda_plugin())


def _cuda_plugin() -> str | None:
    """The package that holds XLA's GPU compiler."""
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    return next((name for name in names if importlib.util.find_spec(name)), None)


def gpu_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for.

    Raises:
      ConfigError: without JAX's CUDA plugin, or when it does not know the target.
    """
    if not has_compiler(topology):
        raise ConfigError(
            f"The compiler for {topology.name} is missing; install it with `pip install -r requirements-cuda.txt` (it runs on "
            "any machine)."
        )
    target = (TARGETS / f"{topology.kind}.txtpb").read_text()
    shape = f"{topology.nodes}x1x{topology.count // topology.nodes}"
    try:
        return topologies().get_topology_desc(platform="cuda", target_config=target, topology=shape).devices
    except Exception as error:  # the plugin has no kinds of its own
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigError(
            f"JAX's CUDA plugin {version('jaxlib')} does not know the target {topology.kind} ({reason}); install the plugin of a "
            "newer JAX, or plan for another chip."
        ) from error


def tpu_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for.

    Raises:
      ConfigError: without libtpu, or for a topology that it does not know.
    """
    try:
        import libtpu
    except ImportError as error:
        raise ConfigError(
            f"The compiler for {topology.name} is missing; install it with `pip install -r requirements-tpu.txt` (it "
            "runs on any machine)."
        ) from error
    del libtpu
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return topologies().get_topology_desc(platform="tpu", topology_name=topology.name, **several).devices
    except Exception as error:  # the plugin has no kinds of its own
        reason = str(error).strip().split("\n")[0][:200]
        if "lockfile" in reason:
            raise ConfigError(
                "Another process is using libtpu; end it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 where nothing runs on a TPU."
            ) from error
        raise ConfigError(
            f"libtpu does not know the topology {topology.name} ({reason}); choose one that Google Cloud rents, such as "
            f"{topology.kind}:{', '.join(SLICES[topology.kind][:3])}."
        ) from error
