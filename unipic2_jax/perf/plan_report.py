"""Costs of `perf.plan` for people: the table, the smallest slice that fits, and what to change where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.parallel.mesh import batch_shards
from unipic2_jax.perf import movers as moving
from unipic2_jax.perf.compiler import Cache
from unipic2_jax.perf.cost import Cost
from unipic2_jax.perf.described import Planned, local_bytes
from unipic2_jax.perf.plan import Plan, plan
from unipic2_jax.perf.topology import GB, Topology, has_compiler
from unipic2_jax.rl.algorithm import algorithm_fields

Costs = Mapping[str, Sequence[Cost]]

HEAD = (
    "| stage | program | parameters | optimizer | batch | results | activations | peak, of memory | FLOPs, of the model's | "
    "from other chips | seconds | MFU |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|"
)


def table(costs: Costs, topology: Topology) -> str:
    """A row a program, everything for one chip and one call, as Markdown; memory in GB (10^9)."""
    chip, lines = topology.chip, [HEAD]
    for stage, rows in costs.items():
        for cost in rows:
            seconds = cost.seconds(topology)
            sizes = (cost.parameters, cost.optimizer, cost.batch, cost.results, cost.activations)
            links = "not compiled"
            if cost.collectives is not None:
                collectives = sorted(cost.collectives.items())
                links = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in collectives) or "nothing"
            useful = f", {cost.model_flops / cost.flops:.0%}" if cost.model_flops else ""
            mfu = f"{cost.model_flops / chip.flops / seconds:.0%}" if cost.model_flops else "-"
            at_least = "" if cost.moved is not None else "> "
            cells = [
                *(stage, cost.name, *(f"{size / GB:.2f}" for size in sizes)),
                f"{cost.peak / GB:.1f}, {cost.peak / topology.memory:.0%}"
                + ("" if fits(cost, topology) else " **too much**"),
                *(f"{cost.flops / 1e12:.2f} T{useful}", links, f"{at_least}{seconds:.3f}", mfu),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        whole = sum(cost.calls * cost.seconds(topology) for cost in rows)
        model = sum(cost.calls * cost.model_flops for cost in rows)
        lines.append(
            f"| {stage} | **a step, on the average** |{' |' * 8} {whole:.3f} | {model / chip.flops / whole:.0%} |"
        )
    return "\n".join(lines) + "\n"


def movers(costs: Costs, count: int) -> str:
    """Of every compiled program the bytes of memory that it moves, by kind and by pass, and its `count` largest movers; Markdown."""
    parts = []
    for stage, rows in costs.items():
        parts += [f"**{stage}: {cost.name}**\n\n{moving.table(cost.movers, count)}" for cost in rows if cost.movers]
    return "\n".join(parts)


SUMMARY = "| recipe | machine | split | fits | peak, of memory | seconds a step | MFU bound | bound by |\n|---|---|---|---|---:|---|---|---|"


def summary(recipe: str, costs: Costs, topology: Topology, split: str) -> str:
    """The row of `SUMMARY` for a recipe on a machine; what is given by stage stands in the schedule's order."""
    worst = max((cost for rows in costs.values() for cost in rows), key=lambda cost: cost.peak)
    seconds, shares, bounds = [], [], []
    for stage, rows in costs.items():
        whole = sum(cost.calls * cost.seconds(topology) for cost in rows)
        model = sum(cost.calls * cost.model_flops for cost in rows)
        seconds.append(f"{stage} {whole:.2f}" if len(costs) > 1 else f"{whole:.2f}")
        shares.append(f"{model / topology.chip.flops / whole:.0%}")
        bounds.append(bound(max(rows, key=lambda cost: cost.calls * cost.seconds(topology)), topology))
    by = bounds[0] if len(set(bounds)) == 1 else ", ".join(bounds)
    cells = [
        *(recipe, str(topology), split, "yes" if fits(worst, topology) else "**no**"),
        f"{worst.peak / GB:.1f}, {worst.peak / topology.memory:.0%} ({worst.stage}: {worst.name})",
        *(", ".join(seconds), ", ".join(shares), by),
    ]
    return f"| {' | '.join(cells)} |"


def bound(cost: Cost, topology: Topology) -> str:
    """What bounds a program: products, memory or links."""
    parts = cost.parts(topology)
    return max(parts, key=parts.__getitem__)


def kernels(made: Plan) -> Iterator[str]:
    """Sentences: which kernel attention got in every network, and the kernels of cuDNN in the compiled programs."""
    for stage, calls in made.attention.items():
        if calls:
            yield f"Attention in '{stage}': {'; '.join(map(str, calls))}."
    for stage, rows in made.costs.items():
        for cost in rows:
            places = [f"{name.split('$')[-1]} in {n} places" for name, n in cost.kernels.items() if "fmha" in name]
            if places:
                yield f"The compiled {cost.name} of '{stage}' calls cuDNN's {', '.join(places)}."


def fits(cost: Cost, topology: Topology) -> bool:
    """Whether a chip has the memory."""
    return cost.peak <= topology.memory


def advice(config: ConfigDict, costs: Costs, topology: Topology) -> list[str]:
    """A sentence for each stage that does not fit: what to change first."""
    sentences = []
    for stage, rows in costs.items():
        worst = max(rows, key=lambda cost: cost.peak)
        if fits(worst, topology):
            continue
        kept = worst.parameters + worst.optimizer + worst.results
        needs = f"Stage '{stage}' needs {worst.peak / GB:.1f} GB of {topology.memory / GB:.1f} GB a chip ({worst.name})"
        sentences.append(f"{needs}; {_remedy(config, stage, worst, kept, topology)}.")
    return sentences


def _remedy(config: ConfigDict, stage: str, worst: Cost, kept: float, topology: Topology) -> str:
    """What to change about the largest part of a peak."""
    stage_config, preset = config.stages[stage], config.parallel.preset
    if preset == "ddp" and kept > worst.activations:
        return "split parameters and optimizer over the chips: --config.parallel.preset=fsdp"
    if worst.activations < kept:
        return "take a larger slice, over which parameters and optimizer are split further"
    remat = stage_config.get("remat", "full")
    if remat != "full":
        return f"keep less for the backward pass: --config.stages.{stage}.remat=full (now {remat})"
    remedies, devices = [], batch_shards(topology.abstract_mesh(config.parallel))
    if stage_config.kind == "flow":
        parts = 2 * stage_config.accumulation
        if stage_config.batch_size % (parts * devices) == 0:
            remedies.append(f"compute a batch in more parts: --config.stages.{stage}.accumulation={parts}")
    elif worst.name == "update":
        fields = algorithm_fields(stage_config)
        part = stage_config.num_prompts * fields.group_size // fields.updates_per_rollout
        half = max(fields.micro_batch or part, devices) // 2
        if half % devices == 0:
            remedies.append(
                f"compute an update in more parts: --config.stages.{stage}.{stage_config.kind}.micro_batch={half}"
            )
    else:
        remedies.append(
            f"draw fewer samples a step: --config.stages.{stage}.num_prompts={max(1, stage_config.num_prompts // 2)}"
        )
    if topology.is_tpu and preset != "fsdp_sp":  # which cannot be counted for GPUs
        remedies.append("split the tokens of a sample too: --config.parallel.preset=fsdp_sp")
    return ", or ".join(remedies) or "take chips with more memory"


def smallest(config: ConfigDict, made: Plan, topology: Topology) -> tuple[Topology | None, list[str]]:
    """The smallest slice of the same chips on which every program fits, by scaling.

    Parameters, optimizer and batch are exact there; results and activations are scaled by the rows that a chip has, which is
    a little too much for smaller slices and a little too little for larger ones, since gathered parameters do not shrink.

    Returns:
      The slice, or None where none does; and the smaller ones on which batches do not come out even.
    """
    uneven = []
    rows = batch_shards(topology.abstract_mesh(config.parallel))
    for other in topology.larger():
        try:
            there = other.abstract_mesh(config.parallel)
            for planned in made.stages:
                planned.check(there)
        except ConfigError:
            uneven.append(str(other))
            continue
        ratio = rows / batch_shards(there)
        if all(
            _scaled_peak(cost, planned, there, ratio) <= other.memory
            for planned in made.stages
            for cost in made.costs[planned.name]
        ):
            return other, uneven
    return None, uneven


def _scaled_peak(cost: Cost, planned: Planned, there: jax.sharding.AbstractMesh, ratio: float) -> float:
    trained, *rest = planned.state().values()
    parameters, optimizer = local_bytes((planned.parameters, trained), there), local_bytes(rest, there)
    return parameters + optimizer + (cost.batch + cost.results + cost.activations) * ratio


def confirmed(
    config: ConfigDict, made: Plan, start: Topology, cache: Cache, log: Callable[[str], None]
) -> Topology | None:
    """The first slice from `start` on where the program with the highest peak, compiled for it, fits."""
    worst = max((cost for rows in made.costs.values() for cost in rows), key=lambda cost: cost.peak)
    only = lambda planned, program: (planned.name, program.name) == (worst.stage, worst.name)
    for other in _from(start):
        try:
            again = plan(config, other, cache=cache, log=log, only=only)
        except ConfigError:
            continue  # its batches do not come out even there
        if all(fits(cost, other) for rows in again.costs.values() for cost in rows):
            return other
    return None


def _from(start: Topology) -> Iterator[Topology]:
    passed = False
    for other in start.larger():
        passed = passed or other.name == start.name
        if passed:
            yield other


def smallest_sentence(
    config: ConfigDict, made: Plan, topology: Topology, how: str, cache: Cache, log: Callable[[str], None]
) -> str:
    """The smallest slice that fits, and how that is known.

    Args:
      how: 'estimate', or 'confirm' to compile the largest program there.
    """
    machine, uneven = smallest(config, made, topology)
    parts = f" ({', '.join(uneven)}: its batches do not come out even)" if uneven else ""
    if machine is None:
        return f"No slice of {topology.kind} that is rented has the memory, by scaling these figures{parts}."
    if how == "confirm":
        machine = confirmed(config, made, machine, cache, log)
        if machine is None:
            return f"No slice of {topology.kind} that is rented has the memory, by the largest program on each{parts}."
        known = "confirmed by the largest program, " + ("compiled" if has_compiler(topology) else "counted") + " for it"
    elif machine.name == topology.name:
        known = "by these figures, and by scaling them to the smaller ones"
    else:
        known = f"an estimate, by scaling these figures; --smallest=confirm {'compiles' if has_compiler(topology) else 'counts'} for it"
    return f"The smallest slice that fits: {machine}, {known}{parts}."
