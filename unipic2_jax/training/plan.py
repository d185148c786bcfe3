"""Will a recipe fit a machine, and how fast can it be: its real steps, compiled for a TPU that is not there, or counted.

Nothing is allocated: parameters and batches are descriptions of arrays (`pipelines.blank`). For TPUs the steps are compiled
for the topology and the compiler says what they hold; for GPUs, which need a device to compile for, it is arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from unipic2_jax.parallel.mesh import make_mesh
from unipic2_jax.training.config import ConfigError
from unipic2_jax.training.counting import count_flops
from unipic2_jax.training.hlo import Module
from unipic2_jax.training.loop import model_config
from unipic2_jax.training.stage import Program, StageContext, stage_class

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of a chip.

    Attributes:
      memory: bytes.
      flops: of bfloat16 matrix products, a second.
      bandwidth: of its memory, bytes a second.
      link: to the other chips of a slice or node, bytes a second, all links together in one direction.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float


# Google Cloud's pages of the TPU versions; NVIDIA's data sheets (SXM, dense).
CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9, 448e9),
    "h100": Chip(80 * GB, 989e12, 3350e9, 450e9),
    "h200": Chip(141 * GB, 989e12, 4800e9, 450e9),
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


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that a run would have."""

    name: str
    chip: Chip
    count: int
    is_tpu: bool


def read_topology(text: str) -> Topology:
    """'v5p:4x4x4' or 'gpu:8xh200'.

    Raises:
      ConfigError: for anything else.
    """
    kind, _, shape = text.partition(":")
    if kind == "gpu" and (found := re.fullmatch(r"(\d+)x(\w+)", shape)):
        count, name = int(found[1]), found[2]
        if name in CHIPS and name.startswith("h"):
            return Topology(text, CHIPS[name], count, False)
    elif kind in CHIPS and kind.startswith("v") and re.fullmatch(r"\d+(x\d+)+", shape):
        return Topology(text, CHIPS[kind], math.prod(map(int, shape.split("x"))), True)
    raise ConfigError(f"The topology '{text}' is unknown; write v5p:4x4x4, v5e:8x8, v6e:8x8, gpu:8xh100 or gpu:8xh200.")


def tpu_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for.

    Raises:
      ConfigError: without libtpu, or for a topology that it does not know.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except Exception as error:  # the plugin has no kinds of its own
        reason = str(error).strip().split("\n")[0][:200]
        raise ConfigError(
            f"Nothing can be compiled for {topology.name} here ({reason}); install the compiler with "
            "`pip install libtpu`, or choose a topology of Google Cloud's."
        ) from error


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program takes of one chip in one call; bytes and FLOPs.

    Attributes:
      arguments: bytes of what it is given, donated or not; kept: of what it returns beside that.
      temporary: bytes while it runs.
      flops: of all matrix products, recomputation included; model_flops: of the transformer's forward and backward passes.
      moved: bytes to and from memory, as the compiler counts them (the body of a loop once for each turn).
      collectives: bytes sent, by kind of operation.
    """

    name: str
    calls: float
    arguments: float
    kept: float
    temporary: float
    flops: float
    model_flops: float
    moved: float
    collectives: Mapping[str, float]

    @property
    def peak(self) -> float:
        """Bytes held at once."""
        return self.arguments + self.kept + self.temporary

    def seconds(self, chip: Chip) -> float:
        """A lower bound by the roofline: the slowest of products, memory and links, each at its peak."""
        return max(self.flops / chip.flops, self.moved / chip.bandwidth, sum(self.collectives.values()) / chip.link)


def stages(config: ConfigDict, mesh: jax.sharding.Mesh) -> Iterator[tuple[str, list[Program]]]:
    """The programs of every stage of a schedule, on a model and data that are descriptions."""
    from unipic2_jax.pipelines.blank import abstract_bundle

    for index, name in enumerate(config.schedule):
        stage, model = config.stages[name].copy_and_resolve_references(), config.stages[name].model
        with stage.unlocked():
            if stage.kind == "flow":
                resolution = max(pixels for _, pixels in stage.resolutions) or 512
                stage.data, stage.validation.data = (
                    ConfigDict({"kind": "blank", "resolution": resolution}),
                    ConfigDict(),
                )
                stage.loader_threads = 0
            elif stage.kind == "grpo":
                stage.source = ConfigDict({"kind": "blank", "task": stage.source.get("task", "t2i")})
                stage.rewards = ConfigDict()
            stage.evaluations = ConfigDict()
        context = StageContext(name, index, config.seed, mesh, Path("."), log=lambda sentence: None)
        bundle = abstract_bundle(model_config(config, model), mesh)
        yield name, stage_class(stage.kind)(stage, bundle, context).programs()


def compiled_cost(program: Program, chips: int) -> Cost:
    """Of a program compiled for the devices that its arguments are described on."""
    compiled = program.function.lower(*program.arguments, **program.keywords).compile()
    memory = compiled.memory_analysis()
    module = Module.read(compiled.as_text())
    return Cost(
        program.name,
        program.calls,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        count_flops(program.function, *program.arguments, **program.keywords) / chips,
        program.model_flops / chips,
        module.moved_bytes(),
        module.collective_bytes(),
    )


def plan(config: ConfigDict, topology: Topology) -> dict[str, list[Cost]]:
    """Costs of every stage's programs on a TPU topology.

    Raises:
      ConfigError: when the recipe's batches do not split over the chips, or nothing can be compiled here.
    """
    sizes = config.parallel.to_dict()
    preset, slices = sizes.pop("preset"), sizes.pop("slices")
    try:
        mesh = make_mesh(tpu_devices(topology), preset, sizes, slices)
    except ValueError as error:
        raise ConfigError(f"config.parallel: {error}") from error
    with jax.set_mesh(mesh):
        return {
            name: [compiled_cost(program, topology.count) for program in programs]
            for name, programs in stages(config, mesh)
        }


def table(costs: Mapping[str, Sequence[Cost]], topology: Topology) -> str:
    """A row a program, per chip, as Markdown."""
    chip = topology.chip
    lines = [
        "| stage | program | state and batch | temporary | peak, of memory | FLOPs, of the model's | links | seconds | MFU |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for stage, rows in costs.items():
        for cost in rows:
            seconds = cost.seconds(chip)
            links = (
                ", ".join(f"{kind} {size / GB:.2f} GB" for kind, size in sorted(cost.collectives.items())) or "nothing"
            )
            useful = cost.model_flops / cost.flops if cost.flops else 0
            lines.append(
                f"| {stage} | {cost.name} | {(cost.arguments + cost.kept) / GB:.2f} GB | {cost.temporary / GB:.2f} GB | "
                f"{cost.peak / GB:.2f} GB, {cost.peak / chip.memory:.0%} | {cost.flops / 1e12:.2f} T, {useful:.0%} | {links} | "
                f"{seconds:.3f} | {cost.model_flops / chip.flops / seconds:.0%} |"
            )
        whole = sum(cost.calls * cost.seconds(chip) for cost in rows)
        model = sum(cost.calls * cost.model_flops for cost in rows)
        lines.append(f"| {stage} | **a step** | | | | | | {whole:.3f} | {model / chip.flops / whole:.0%} |")
    return "\n".join(lines) + "\n"


# Larger and larger slices of each kind of chip that Google Cloud rents.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


def advice(config: ConfigDict, costs: Mapping[str, Sequence[Cost]], topology: Topology) -> list[str]:
    """A sentence for each stage that does not fit: what to change first."""
    sentences = []
    for stage, rows in costs.items():
        worst = max(rows, key=lambda cost: cost.peak)
        if worst.peak <= topology.chip.memory:
            continue
        own, preset = config.stages[stage], config.parallel.preset
        if preset == "ddp":
            remedy = "split the parameters too: --config.parallel.preset=fsdp"
        elif worst.temporary > worst.arguments:
            field = "accumulation" if own.kind == "flow" else "grpo.micro_batch"
            remedy = f"compute a batch in smaller parts: --config.stages.{stage}.{field}"
        else:
            remedy = "take a larger slice"
        sentences.append(
            f"Stage '{stage}' needs {worst.peak / GB:.1f} GB of {topology.chip.memory / GB:.1f} GB a chip ({worst.name}); {remedy}."
        )
    return sentences
