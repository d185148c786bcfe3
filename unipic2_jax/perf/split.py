"""How devices can share a recipe's work, and in what parts they compute a batch: priced by the arithmetic of `perf.plan`, the fastest
that fits first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.parallel.mesh import AXES, batch_shards
from unipic2_jax.perf.plan import Plan, counted
from unipic2_jax.perf.plan_report import bound
from unipic2_jax.perf.topology import GB, NODE, Topology, of_devices
from unipic2_jax.rl.algorithm import ALGORITHMS, algorithm_fields
from unipic2_jax.training.config import AUTO, GATHERS, left_to_plan, unplanned

PARTS = 32  # of a parameter on TPUs, at most
FEW = 4  # samples a device, while the split is chosen
ROOM = 0.95  # of a chip's memory, that parts may fill by arithmetic
# What a plan may choose for `remat`, the least work first.
REMATS = ("dots", "full")


@dataclasses.dataclass(frozen=True)
class Split:
    """One way to share the work, and what it takes of the fullest chip.

    Attributes:
      parallel: `config.parallel` for it.
      parts: fields of stages that say in how many parts a batch is computed, by their dotted names.
      seconds: of a step on the average over the whole schedule, a lower bound; by stage.
      peak, memory: bytes; resident: of them what stays between programs.
      bound: of the slowest program, what bounds it.
      reinforces: whether there are frozen weights that are gathered.
      plan: all of its costs.
    """

    parallel: ConfigDict
    parts: dict[str, int]
    stages: dict[str, float]
    seconds: float
    peak: float
    resident: float
    memory: float
    bound: str
    reinforces: bool
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether every program has the memory."""
        return self.peak <= self.memory

    def __str__(self) -> str:
        return _words(self.parallel, self.reinforces)

    def figures(self) -> str:
        """Its time and memory."""
        room = f"{self.peak / GB:.0f} of {self.memory / GB:.0f} GB"
        return f"{self.seconds:.2f} s a step, {room}" if self.fits else f"does not fit, {room}"


def splits(config: ConfigDict, topology: Topology) -> list[ConfigDict]:
    """Every `config.parallel` that shares a batch over all chips: copies of the parameters ('data') of so many parts each
    ('fsdp'). Of GPUs in several nodes a copy is inside of a node, or split over all."""
    count = topology.count
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    # libtpu makes all-reduces of the gathers of more parts (docs/scaling.md).
    sizes = [n for n in sizes if n <= PARTS] if topology.is_tpu else [n for n in sizes if n <= NODE or n == count]
    options = []
    for fsdp, gather in itertools.product(sizes, GATHERS if _reinforces(config) else GATHERS[:1]):
        if fsdp == 1 and gather != GATHERS[0]:
            continue
        with (parallel := config.parallel.copy_and_resolve_references()).unlocked():
            parallel.update(
                {"preset": "fsdp", "data": count // fsdp, "fsdp": fsdp, "tensor": 1, "sequence": 1, "gather": gather}
            )
        options.append(parallel)
    return options


def priced(
    config: ConfigDict,
    topology: Topology,
    log: Callable[[str], None] = lambda sentence: None,
    parts: Mapping[str, int] | None = None,
) -> list[Split]:
    """All `splits` of a recipe, those that fit before those that do not, the fastest first.

    Args:
      parts: what the recipe's fields of `Split.parts` were set to, to be told.

    Raises:
      ConfigError: when the recipe's batches do not come out even.
    """
    possible = splits(config, topology)
    options = []
    for parallel, made in zip(possible, counted(config, topology, possible, log=log)):
        rows = {name: costs for name, costs in made.costs.items() if costs}
        stages = {name: sum(cost.calls * cost.seconds(topology) for cost in costs) for name, costs in rows.items()}
        steps = {name: config.stages[name].steps for name in rows}
        every = [cost for costs in rows.values() for cost in costs]
        seconds = sum(stages[name] * steps[name] for name in rows) / sum(steps.values())
        options.append(
            Split(
                parallel,
                dict(parts or {}),
                stages,
                seconds,
                max(cost.peak for cost in every),
                max(cost.parameters + cost.optimizer for cost in every),
                topology.memory,
                bound(max(every, key=lambda cost: cost.calls * cost.seconds(topology)), topology),
                _reinforces(config),
                made,
            )
        )
    return _ordered(options)


def searched(config: ConfigDict, topology: Topology, log: Callable[[str], None] = lambda sentence: None) -> list[Split]:
    """`priced` for the parts too that a batch can be computed in, GRPO's micro_batch and a flow stage's accumulation, and for what the
    backward pass finds of the forward pass where a recipe leaves that to the plan."""
    options = []
    for remat, factor in itertools.product(REMATS if left_to_plan(config) else REMATS[:1], (1, 2, 4, 8)):
        parts = _parts(config, topology.count, factor)
        if parts is None:
            continue
        parts |= {f"stages.{name}.remat": remat for name in left_to_plan(config)}
        with (changed := config.copy_and_resolve_references()).unlocked():
            changed.update_from_flattened_dict(parts)
        try:
            options += priced(changed, topology, log, parts)
        except ConfigError as error:
            log(f"{', '.join(f'{name}={value}' for name, value in parts.items())}: {error}")
    return _ordered(options)


def described(config: ConfigDict) -> str:
    """The split of a configuration in a few words."""
    return _words(config.parallel, _reinforces(config))


def _words(parallel: ConfigDict, reinforces: bool) -> str:
    axes = ", ".join(f"{axis} {parallel[axis]}" for axis in AXES if parallel[axis] > 1)
    how = "layer by layer" if parallel.gather == "layer" else "once an update"
    split = parallel.fsdp > 1 or ("fsdp" in parallel.preset and not parallel.fsdp)
    shape = axes if parallel.fsdp else ", ".join(filter(None, (f"preset {parallel.preset}", axes)))
    return (shape or "one device") + (f", frozen weights gathered {how}" if split and reinforces else "")


def _reinforces(config: ConfigDict) -> bool:
    return any(config.stages[name].kind in ALGORITHMS for name in config.schedule)


def _ordered(options: Sequence[Split]) -> list[Split]:
    """The fastest split comes first. Among splits that are equally fast, to a percent, those whose copies are inside of a node come first, then those with the most
    room; of those that do not fit the smallest."""
    best = min((split.seconds for split in options if split.fits), default=0.0)

    def place(split: Split) -> tuple[float, ...]:
        if not split.fits:
            return 2, split.peak
        if split.seconds <= 1.01 * best:
            return 0, split.parallel.fsdp > NODE, split.peak
        return 1, split.seconds

    return sorted(options, key=place)


def _parts(config: ConfigDict, devices: int, samples: int) -> dict[str, Any] | None:
    """Fields with which a device computes so many samples of every stage at once; None where that does not come out even."""
    parts: dict[str, Any] = {}
    for name in config.schedule:
        stage, fields = config.stages[name], algorithm_fields(config.stages[name])
        if fields is None and stage.kind != "flow":
            continue
        whole = (
            stage.batch_size if fields is None else stage.num_prompts * fields.group_size // fields.updates_per_rollout
        )
        if whole % (samples * devices):
            return None
        parts |= _fields(config, name, devices, samples)
    return parts


def resolved(config: ConfigDict, log: Callable[[str], None]) -> ConfigDict:
    """`settled` for the devices that JAX has. Of devices without a data sheet nothing can be said: few samples at once then, and the
    least memory.

    Raises:
      ConfigError: when nothing fits, or a split is to be chosen for devices without a data sheet.
    """
    try:
        topology = of_devices(jax.devices())
    except ConfigError as error:
        if config.parallel.preset == AUTO:
            raise
        log(f"remat=auto is 'full', a few samples at once: {error}")
        return _in_small_parts(config, jax.device_count())
    return settled(config, topology, log)


def settled(config: ConfigDict, topology: Topology, log: Callable[[str], None]) -> ConfigDict:
    """The configuration with nothing 'auto' in it; says what was chosen and why.

    The split comes first, by what a step takes in small parts and as a whole. Then each stage whose `remat` is 'auto' gets what makes it fastest in the
    memory that is left: what the backward pass finds, and as many samples at once as fit, since weights then travel for more of them.

    Raises:
      ConfigError: when nothing fits.
    """
    stages, changed = left_to_plan(config), _in_small_parts(config, topology.count)
    if config.parallel.preset == AUTO:
        # Parameters that are in parts are gathered for each part of a batch, so that it matters how many there are.
        whole = [] if changed == unplanned(config) else priced(unplanned(config), topology)
        split = chosen(_ordered([*priced(changed, topology), *whole]), log)
        changed = _with(changed, {f"parallel.{name}": value for name, value in split.parallel.items()})
    if stages and batch_shards(topology.abstract_mesh(changed.parallel)) < topology.count:
        log("remat=auto is 'full', a few samples at once: only splits of the batch over all chips are counted.")
        return changed
    for stage in stages:
        changed = _with_parts(config, changed, stage, topology, log)
    return changed


def _in_small_parts(config: ConfigDict, devices: int) -> ConfigDict:
    """`unplanned`, with a few samples a device at once where a recipe leaves that to the plan."""
    parts: dict[str, int] = {}
    for name in left_to_plan(config):
        if rows := _rows(config, name, devices):
            parts |= _fields(config, name, devices, max(n for n in range(1, FEW + 1) if rows % n == 0))
    return _with(unplanned(config), parts)


def _rows(config: ConfigDict, name: str, devices: int) -> int:
    """Samples that a device computes of an update or a step, of which the plan may make parts; 0: the recipe says it."""
    stage, fields = config.stages[name], algorithm_fields(config.stages[name])
    if fields is None:
        return 0 if stage.accumulation else stage.batch_size // devices
    return 0 if fields.micro_batch else stage.num_prompts * fields.group_size // fields.updates_per_rollout // devices


def _fields(config: ConfigDict, name: str, devices: int, samples: int) -> dict[str, int]:
    """The field with which a device computes so many samples of a stage at once."""
    stage = config.stages[name]
    if algorithm_fields(stage) is None:
        return {f"stages.{name}.accumulation": stage.batch_size // (samples * devices)}
    return {f"stages.{name}.{stage.kind}.micro_batch": samples * devices}


def _with_parts(
    recipe: ConfigDict, config: ConfigDict, name: str, topology: Topology, log: Callable[[str], None]
) -> ConfigDict:
    """The configuration with the fastest `remat` and parts of a stage that fit, by arithmetic; as it is where none does."""
    rows, best = _rows(recipe, name, topology.count), None
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0] or [0]  # 0: as the recipe says
    for remat, samples in itertools.product(REMATS, sizes):
        if best is not None and best[1] == remat:
            continue  # the largest parts that fit are the fastest ones of a policy
        parts = _fields(recipe, name, topology.count, samples) if samples else {}
        changed = _with(config, {"schedule": (name,), f"stages.{name}.remat": remat, **parts})
        trains = lambda planned, program: bool(program.gradients)
        (made,) = counted(changed, topology, [config.parallel], only=trains)
        costs = made.costs[name]
        peak = max(cost.peak for cost in costs)
        seconds = sum(cost.calls * cost.seconds(topology) for cost in costs)
        if peak <= ROOM * topology.memory and (best is None or seconds < best[0]):
            best = seconds, remat, samples, peak, _with(config, {f"stages.{name}.remat": remat, **parts})
    if best is None:
        log(f"{name}: not even one sample a chip fits by arithmetic; remat is 'full'.")
        return config
    seconds, remat, samples, peak, chosen_config = best
    at_once = f", {samples} samples a chip at once" if samples else ""
    log(
        f"{name}: remat is '{remat}'{at_once} ({seconds:.2f} s and {peak / GB:.0f} of {topology.memory / GB:.0f} GB, by arithmetic)."
    )
    return chosen_config


def chosen(options: Sequence[Split], log: Callable[[str], None]) -> Split:
    """The first of `priced` or `searched`; says which and why.

    Raises:
      ConfigError: when it does not fit.
    """
    first, *others = options
    if not first.fits:
        raise ConfigError(
            f"No split of this recipe fits {first.memory / GB:.0f} GB a chip, the smallest needs {first.peak / GB:.0f}; compute "
            "in more parts (grpo.micro_batch, accumulation), or take more or larger chips."
        )
    alternatives = "; ".join(f"{split} ({split.figures()})" for split in others[:3])
    log(
        f"parallel.preset=auto: {first} ({first.figures()}, by arithmetic), rather than {alternatives or 'nothing else'}."
    )
    return first


def _with(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    with (changed := config.copy_and_resolve_references()).unlocked():
        changed.update_from_flattened_dict(values)
    return changed.lock()


def table(options: Sequence[Split], topology: Topology) -> Iterator[str]:
    """A Markdown row for each."""
    yield "| split | parts | fits | peak, of memory | resident | seconds a step | bound by |"
    yield "|---|---|---|---:|---:|---:|---|"
    for split in options:
        parts = ", ".join(f"{name.split('.', 1)[1]} {value}" for name, value in split.parts.items())
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in split.stages.items())
        cells = [
            *(str(split), parts or "-", "yes" if split.fits else "**no**"),
            f"{split.peak / GB:.1f}, {split.peak / topology.memory:.0%}",
            *(f"{split.resident / GB:.1f}", stages, split.bound),
        ]
        yield f"| {' | '.join(cells)} |"
