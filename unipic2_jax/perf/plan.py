"""Will a recipe fit a machine, and how fast can it be: its real steps, compiled for chips that are not there, or counted.

Nothing is allocated: parameters and batches are descriptions of arrays (`perf.blank_model`). For TPUs the steps are compiled
for the topology and the compiler says what they hold, and for GPUs likewise, where JAX's CUDA plugin is installed; else it is
arithmetic (`perf.liveness`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models.attention import Call, recorded
from unipic2_jax.parallel.compat import AbstractMesh, use_mesh
from unipic2_jax.parallel.mesh import batch_shards, make_mesh
from unipic2_jax.parallel.rules import RULES, axis_names
from unipic2_jax.perf.compiler import Cache, compile_program
from unipic2_jax.perf.cost import Cost
from unipic2_jax.perf.counting import is_single, jaxpr_flops, product_count
from unipic2_jax.perf.described import Planned, held, local, stages
from unipic2_jax.perf.hlo import BETWEEN_NODES
from unipic2_jax.perf.liveness import measure
from unipic2_jax.perf.movers import Mover
from unipic2_jax.perf.topology import Topology, has_compiler
from unipic2_jax.training.stage import Program

# Activations that XLA's GPU compiler holds at most, in parts of the counted ones, by whether logits of attention are held
# (docs/scaling.md).
CALIBRATION = {"flash": 1.2, "logits": 1.5}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stages, and for each of them the costs of its programs and, where these were compiled, the kernels of attention."""

    stages: list[Planned]
    costs: dict[str, list[Cost]]
    attention: dict[str, list[Call]] = dataclasses.field(default_factory=dict)


def _flops(traced: jax.stages.Traced, chips: int) -> dict[str, float]:
    jaxpr = traced.jaxpr.jaxpr
    return {"flops": jaxpr_flops(jaxpr) / chips, "single": jaxpr_flops(jaxpr, is_single) / chips}


def compiled_cost(
    planned: Planned,
    program: Program,
    mesh: Mesh,
    topology: Topology,
    cache: Cache,
    log: Callable[[str], None],
    flags: str,
) -> Cost:
    """The cost of a program compiled for the devices that its arguments are described on."""
    traced = program.function.trace(*program.arguments, **program.keywords)
    said = compile_program(traced, mesh, topology, cache, log, flags)
    parameters, optimizer, batch = held(planned, program, mesh)
    # Known when it has been compiled only; a new state takes the place of the old one.
    results = said["results"] or 0.0
    return Cost(
        planned.name,
        program.name,
        program.calls,
        parameters,
        optimizer,
        batch,
        results,
        said["temporary"],
        **_flops(traced, topology.count),
        model_flops=program.model_flops / topology.count,
        **{field: said[field] for field in ("moved", "collectives", "ports", "kernels")},
        movers=[Mover(*mover) for mover in said["movers"]],
    )


def counted_cost(
    planned: Planned,
    program: Program,
    traced: jax.stages.Traced,
    mesh: AbstractMesh,
    topology: Topology,
    flash: bool,
    at_once: bool,
) -> Cost:
    """The cost, by arithmetic, of a program that was built and traced for one chip's rows, by arithmetic.

    Args:
      mesh: of all chips.
      flash: whether attention in 16 bits holds no logits.
      at_once: whether what a program can gather before anything else is gathered there.
    """
    weights: list[float | None] = []
    trained_too: list[bool] = []
    ahead, along = 0.0, {"fsdp"}
    for role, argument in zip(program.roles, program.arguments, strict=True):
        for leaf in jax.tree.leaves(argument):
            whole = math.prod(leaf.shape) * leaf.dtype.itemsize
            share = None if role == "batch" else local(leaf, mesh) / whole
            if role == "gathered" and at_once:
                ahead += whole if share < 1 else 0.0
                share = 1.0
            weights.append(share)
            trained_too.append(role == "state")
            if share is not None and share < 1:
                along |= {name for entry in leaf.sharding.spec for name in axis_names(entry)}
    work = measure(traced, weights, flash, trained_too)
    received = {("all-gather", tuple(along)): work.gathered + ahead}

    def sums(kind: str, axes: tuple[str, ...], size: float) -> None:
        received[kind, axes] = received.get((kind, axes), 0.0) + size * program.gradients

    if program.gradients and batch_shards(mesh) > 1:
        trained = next(iter(planned.state().values()))
        for leaf in jax.tree.leaves(trained):
            share_of_chip, whole = local(leaf, mesh), math.prod(leaf.shape) * leaf.dtype.itemsize
            if share_of_chip < whole:
                sums("reduce-scatter", ("fsdp",), whole)
                sums("all-reduce", ("data",), 2 * share_of_chip if mesh.shape["data"] > 1 else 0.0)
            else:
                sums("all-reduce", RULES.batch, 2 * whole)
    collectives: dict[str, float] = {}
    ports = 0.0
    for (kind, axes), size in received.items():
        if size:
            members = topology.crossing(mesh, axes)
            name = kind + (BETWEEN_NODES if members else "")
            collectives[name] = collectives.get(name, 0.0) + size
            ports += size / members if members else 0.0
    parameters, optimizer, _ = held(planned, program, mesh)
    kind = "logits" if work.logits else "flash"
    batch = [argument for role, argument in zip(program.roles, program.arguments) if role == "batch"]
    return Cost(
        planned.name,
        program.name,
        program.calls,
        parameters,
        optimizer,
        float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))),
        work.results,
        (ahead + work.held) * CALIBRATION[kind],
        **_flops(traced, 1),
        model_flops=program.model_flops,
        moved=work.moved + 2 * ahead,
        collectives=collectives,
        ports=ports,
        products=product_count(traced.jaxpr.jaxpr),
        calibrated=kind,
    )


def counted(
    config: ConfigDict,
    topology: Topology,
    splits: Sequence[ConfigDict],
    *,
    all_shapes: bool = False,
    log: Callable[[str], None] = lambda sentence: None,
    only: Callable[[Planned, Program], bool] = lambda planned, program: True,
) -> list[Plan]:
    """A plan by arithmetic for each of several `config.parallel`; every program is traced once.

    Args:
      splits: all of them split the batch over all chips.

    Raises:
      ConfigError: when the recipe's batches do not come out even.
    """
    meshes = [topology.abstract_mesh(parallel) for parallel in splits]
    if any(batch_shards(whole) < topology.count for whole in meshes):
        raise ConfigError(
            f"Steps on {topology} are counted here, and that works for batches split over all chips only; choose "
            "--config.parallel.preset=fsdp or ddp, or install the compiler: pip install -r "
            f"requirements-{'tpu' if topology.is_tpu else 'cuda'}.txt."
        )
    mesh = make_mesh(jax.local_devices()[:1], "fsdp")  # every process of a run counts for itself
    flash = config.get("attention", "auto") != "xla"
    plans = [Plan([], {}) for _ in splits]
    with use_mesh(mesh):
        built = stages(config, mesh, all_shapes=all_shapes, log=log, shards=topology.count, split=meshes[0])
        for planned in built:
            for made in plans:
                made.stages.append(planned)
                made.costs[planned.name] = []
            for program in planned.programs:
                if not only(planned, program):
                    continue
                traced = program.function.trace(*program.arguments, **program.keywords)
                for made, whole, parallel in zip(plans, meshes, splits):
                    at_once = parallel.gather == "update"
                    cost = counted_cost(planned, program, traced, whole, topology, flash, at_once)
                    made.costs[planned.name].append(cost)
                log(f"{topology} {planned.name}: {program.name}: counted")
    return plans


def plan(
    config: ConfigDict,
    topology: Topology,
    *,
    all_shapes: bool = False,
    cache: Cache | None = None,
    log: Callable[[str], None] = lambda sentence: None,
    only: Callable[[Planned, Program], bool] = lambda planned, program: True,
    count: bool = False,
) -> Plan:
    """Costs of every stage's programs.

    Args:
      config: validated.
      all_shapes: see `stages`.
      log: takes a line for each program.
      only: which programs.
      count: by arithmetic also where there is a compiler.

    Raises:
      ConfigError: when the recipe's batches do not split over the chips, or nothing can be compiled here.
    """
    if count or not has_compiler(topology):
        return counted(config, topology, [config.parallel], all_shapes=all_shapes, log=log, only=only)[0]
    cache, mesh = cache or Cache(None), topology.mesh(config.parallel)
    found = Plan([], {})
    with use_mesh(mesh), recorded() as calls:
        for planned in stages(config, mesh, all_shapes=all_shapes, log=log):
            found.stages.append(planned)
            found.costs[planned.name] = []
            for program in planned.programs:
                if not only(planned, program):
                    continue
                say = lambda found, at=f"{topology} {planned.name}: {program.name}": log(f"{at}: {found}")
                found.costs[planned.name].append(
                    compiled_cost(planned, program, mesh, topology, cache, say, config.xla_flags)
                )
            found.attention[planned.name] = list(calls)
            calls.clear()
    return found
