"""What `launch.train` says before its first step: devices, how they share the work, what that takes by the plan, where things go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unipic2_jax.perf.cost import Cost
from unipic2_jax.perf.plan import Plan, counted
from unipic2_jax.perf.plan_report import bound
from unipic2_jax.perf.split import described
from unipic2_jax.perf.topology import GB, Topology, of_devices
from unipic2_jax.rl.algorithm import algorithm_fields
from unipic2_jax.weights.precision import PRECISIONS

# Seconds that XLA takes for a matrix product of a program, loops counted once. Compiled for 8 H100s on two cores: 122 s for the 419 of
# PDTR's editing update, 28 s for the 106 of its rollout, 3 s for the 41 of its decoder.
COMPILE = 0.3


def table(config: ConfigDict, mesh: Mesh, workdir: str) -> str:
    """Lines of two columns.

    Args:
      config: with nothing 'auto' in it.
      workdir: what people know it as.
    """
    devices = list(mesh.devices.flat)
    made, why = None, ""
    if devices[0].platform != "cpu":
        try:
            topology = of_devices(devices)
            made = counted(config, topology, [config.parallel])[0]
        except Exception as error:  # a run does not end for a table; the table says what it lacks
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    rows = [
        ("devices", _devices(devices)),
        ("split", _split(config, mesh)),
        ("precision", _precision(config.precision)),
    ]
    for name in config.schedule:
        costs = made.costs[name] if made else []
        rows.append(
            (name, "; ".join([*_work(config.stages[name]), *(_cost(config, name, costs, topology) if costs else ())]))
        )
    if why:
        rows.append(("not counted", why))
    rows += [*_programs(config, made), ("workdir", f"{workdir}: {_kept(config)}; report.md and export/ at the end")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)


def _devices(devices: Sequence[Any]) -> str:
    stats = devices[0].memory_stats() if devices[0].process_index == jax.process_index() else None
    memory = f", {stats['bytes_limit'] / GB:.0f} GB each for programs" if stats and "bytes_limit" in stats else ""
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{memory}{processes}"


def _split(config: ConfigDict, mesh: Mesh) -> str:
    """The axes that the mesh has, whichever preset they came from."""
    with (sized := config.copy_and_resolve_references()).unlocked():
        sized.parallel.update(dict(mesh.shape))
    return described(sized)


def _precision(name: str) -> str:
    policy = PRECISIONS[name]
    if policy.stored == policy.trained == policy.compute:
        return name
    files = ", or as in their files" if policy.as_files else ""
    return f"{name}: {policy.compute} arithmetic, {policy.trained} for what is trained, {policy.stored} for other weights{files}"


def _work(stage: ConfigDict) -> Iterator[str]:
    """What a stage does, in how many parts, and what the backward pass finds."""
    fields = algorithm_fields(stage)
    yield f"{stage.steps} steps of {stage.kind}"
    if fields is not None:
        at_once = f", {fields.micro_batch} at once in an update" if fields.micro_batch else ""
        yield f"{stage.num_prompts} x {fields.group_size} samples{at_once}"
    elif "batch_size" in stage:
        parts = stage.get("accumulation") or 1
        yield f"batches of {stage.batch_size}" + (f" in {parts} parts" if parts > 1 else "")
    if "remat" in stage:
        yield f"remat '{stage.remat}'"


def _cost(config: ConfigDict, name: str, costs: Sequence[Cost], topology: Topology) -> Iterator[str]:
    """What a step takes by the plan, a lower bound."""
    resident = max(cost.parameters + cost.optimizer for cost in costs)
    yield f"{resident / GB:.0f} GB resident, at most {max(cost.peak for cost in costs) / GB:.0f} of {topology.memory / GB:.0f}"
    slowest = max(costs, key=lambda cost: cost.calls * cost.seconds(topology))
    seconds = sum(cost.calls * cost.seconds(topology) for cost in costs)
    hours = seconds * config.stages[name].steps / 3600
    yield f"{seconds:.2g} s a step at least (the {slowest.name} by {bound(slowest, topology)}), {hours:.2g} h in all, beside rewards and evaluations"


def _programs(config: ConfigDict, made: Plan | None) -> Iterator[tuple[str, str]]:
    if made is None:
        return
    every = [cost for costs in made.costs.values() for cost in costs]
    minutes = max(1, round(sum(cost.products for cost in every) * COMPILE / 60))
    names = "; ".join(f"{stage} {', '.join(cost.name for cost in costs)}" for stage, costs in made.costs.items())
    kept = f", kept in {jax.config.jax_compilation_cache_dir}" if jax.config.jax_compilation_cache_dir else ""
    flow = any(config.stages[stage].kind == "flow" for stage in made.costs)
    more = ", and others beside the training for other sizes of pictures" if flow else ""
    yield "programs", f"{len(every)} to compile in about {minutes} min the first time{kept}{more} ({names})"


def _kept(config: ConfigDict) -> str:
    every = sorted({config.stages[name].save_every for name in config.schedule})
    return f"a checkpoint every {' or '.join(map(str, every))} steps, {config.keep_checkpoints} kept"
