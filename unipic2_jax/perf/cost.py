"""What a program takes of one chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from unipic2_jax.perf.hlo import BETWEEN_NODES
from unipic2_jax.perf.movers import Mover
from unipic2_jax.perf.topology import NETWORK, Topology


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program takes of one chip in one call; bytes and FLOPs.

    Attributes:
      calls: in a step of its stage, on the average.
      parameters: of all networks of the stage, also those that this program does not use; optimizer: with the moving average.
      batch: other arguments of this program.
      results: what it returns beside the arrays that it was given.
      activations: everything else while it runs.
      flops: of all matrix products, recomputation included; single: those of them in float32.
      model_flops: of the transformer's forward and backward passes.
      moved: to and from memory; collectives: received from other chips, by kind. None where the compiler gave up because the
        program is too large.
      ports: of `collectives`, through a chip's own port to the network between nodes.
      kernels: of libraries, in the compiled program, and in how many places.
      movers: of `moved`, where it was compiled.
      products: that stand in the program, those of a loop once; 0: not counted.
      calibrated: the class of `CALIBRATION` that counted activations are multiplied for; empty: they are compiled ones.
    """

    stage: str
    name: str
    calls: float
    parameters: float
    optimizer: float
    batch: float
    results: float
    activations: float
    flops: float
    single: float
    model_flops: float
    moved: float | None
    collectives: Mapping[str, float] | None
    ports: float = 0.0
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    movers: Sequence[Mover] = ()
    products: int = 0
    calibrated: str = ""

    @property
    def peak(self) -> float:
        """Bytes held at once."""
        return self.parameters + self.optimizer + self.batch + self.results + self.activations

    def parts(self, topology: Topology) -> dict[str, float]:
        """Seconds of products, memory and links, each at its peak. What crosses between nodes waits for the network, the rest
        for the links inside of one."""
        chip = topology.chip
        products = (self.flops - self.single) / chip.flops + self.single / chip.flops32
        inside = sum(size for kind, size in (self.collectives or {}).items() if not kind.endswith(BETWEEN_NODES))
        links = inside / chip.link + self.ports / NETWORK
        return {"products": products, "memory": (self.moved or 0.0) / chip.bandwidth, "links": links}

    def seconds(self, topology: Topology) -> float:
        """A lower bound by the roofline: the slowest of `parts`."""
        return max(self.parts(topology).values())
