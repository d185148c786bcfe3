"""The chips that a plan is made for, and how many of them are rented together."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from unipic2_jax.parallel.mesh import AXES, make_mesh, mesh_sizes
from unipic2_jax.training.config import ConfigError

GB = 1e9
NODE = 8  # GPUs that NVLink joins
# Bytes a second and GPU between nodes: one InfiniBand port of 400 Gb/s each, as in NVIDIA's own machines.
NETWORK = 50e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of a chip.

    Attributes:
      memory: bytes that a program can have.
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
# told otherwise. NVIDIA's data sheets (SXM, dense); a GPU multiplies float32 as TF32.
CHIPS = {
    "v5e": Chip(15.75 * 2**30, 197e12, 197e12, 819e9, 200e9),
    "v5p": Chip(95.74 * 2**30, 459e12, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.25 * 2**30, 918e12, 918e12, 1638e9, 400e9),
    "h100": Chip(80 * GB, 989e12, 494e12, 3350e9, 450e9),
    "h200": Chip(141 * GB, 989e12, 494e12, 4800e9, 450e9),
}

# What JAX calls a device that is there -> which of CHIPS it is; the first that its name begins with.
KINDS = (
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU v6e", "v6e"),
    ("NVIDIA H100 80GB", "h100"),
    ("NVIDIA H200", "h200"),
)


def find_chip(device: jax.Device) -> Chip | None:
    """The data sheet of a device, or None where there is none, as of a CPU."""
    return next((CHIPS[name] for start, name in KINDS if device.device_kind.startswith(start)), None)


# Larger and larger slices of each kind, as they are rented.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "h100": ("1", "2", "4", "8", "16", "32", "64", "128"),
    "h200": ("1", "2", "4", "8", "16", "32", "64", "128"),
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
        """Whether programs can be compiled for it."""
        return self.kind.startswith("v")

    @property
    def link(self) -> float:
        """Bytes a second to the others: of GPUs in several nodes the network decides."""
        return self.chip.link if self.is_tpu or self.count <= NODE else NETWORK

    def larger(self) -> Iterator[Topology]:
        """All slices of its kind, from the smallest."""
        for shape in SLICES[self.kind]:
            yield read_topology(f"{self.kind}:{shape}" if self.is_tpu else f"gpu:{shape}x{self.kind}", self.slices)

    def abstract_mesh(self, parallel: ConfigDict) -> AbstractMesh:
        """The mesh of `config.parallel` without devices, which is enough to say how arrays are split.

        Raises:
          ConfigError: when it does not come out even.
        """
        preset, sizes, slices = _fields(parallel)
        if self.is_tpu and slices != self.slices:
            raise ConfigError(f"config.parallel.slices is {slices} and the topology is {self}; make them equal.")
        try:
            shape = mesh_sizes(self.count, preset, sizes, slices)
        except ValueError as error:
            raise ConfigError(f"config.parallel on {self}: {error}") from error
        return AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def mesh(self, parallel: ConfigDict) -> Mesh:
        """The mesh of `config.parallel` over the devices of a TPU slice that is not there.

        Raises:
          ConfigError: when it does not come out even, or nothing can be compiled here.
        """
        self.abstract_mesh(parallel)
        return make_mesh(tpu_devices(self), *_fields(parallel))


def _fields(parallel: ConfigDict) -> tuple[str, dict[str, int], int]:
    sizes = parallel.to_dict()
    return sizes.pop("preset"), {axis: sizes[axis] for axis in AXES}, sizes["slices"]


def read_topology(text: str, slices: int = 1) -> Topology:
    """'v5p:4x4x4' or 'gpu:8xh200'.

    Args:
      slices: how many of a TPU slice there are. Of GPUs all are named.

    Raises:
      ConfigError: for anything else.
    """
    kind, _, shape = text.partition(":")
    if kind == "gpu" and (found := re.fullmatch(r"([1-9]\d*)x(h\w+)", shape)) and found[2] in CHIPS:
        return Topology(text, found[2], int(found[1]))
    if kind in CHIPS and kind.startswith("v") and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        return Topology(text, kind, slices * math.prod(map(int, shape.split("x"))), slices)
    raise ConfigError(f"The topology '{text}' is unknown; write v5p:4x4x4, v5e:8x8, v6e:8x8, gpu:8xh100 or gpu:8xh200.")


def tpu_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for.

    Raises:
      ConfigError: without libtpu, or for a topology that it does not know.
    """
    from jax.experimental import topologies

    try:
        import libtpu
    except ImportError as error:
        raise ConfigError(
            f"The compiler for {topology.name} is missing; install it with `pip install libtpu` (it runs on any machine), or "
            "plan for GPUs, which is arithmetic: --topology=gpu:8xh200."
        ) from error
    del libtpu
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **several).devices
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
