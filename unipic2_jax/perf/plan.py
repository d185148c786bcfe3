"""Will a recipe fit a machine, and how fast can it be: its real steps, compiled for chips that are not there, or counted.

Nothing is allocated: parameters and batches are descriptions of arrays (`pipelines.blank`). For TPUs the steps are compiled
for the topology and the compiler says what they hold, and for GPUs likewise, where JAX's CUDA plugin is installed; else it is
arithmetic (`training.liveness`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.core.files import write_text
from unipic2_jax.data.buckets import MULTIPLE
from unipic2_jax.data.examples import make_examples
from unipic2_jax.models.attention import Call, recorded
from unipic2_jax.models.registry import FAMILIES, SIZES
from unipic2_jax.parallel.compat import AbstractMesh, core, use_mesh
from unipic2_jax.parallel.mesh import batch_shards, make_mesh
from unipic2_jax.parallel.rules import RULES, axis_names, devices_along
from unipic2_jax.perf.counting import inner_jaxprs, is_single, jaxpr_flops
from unipic2_jax.perf.hlo import BETWEEN_NODES, Module
from unipic2_jax.perf.liveness import measure
from unipic2_jax.perf.topology import NETWORK, Topology, has_compiler
from unipic2_jax.training.config import model_config
from unipic2_jax.training.stage import Program, Stage, StageContext, stage_class
from unipic2_jax.training.stages.grpo import tell_micro_batch
from unipic2_jax.weights.precision import PRECISIONS

# Of TPU programs: a quarter of the compiler's time, and about the same memory: what it leaves out are searches for faster code.
EFFORT = {"jax_optimization_level": "O0"}
# How the compiler says that a program is too large, in units of GiB or MiB.
_TOO_LARGE = re.compile(r"temporaries \(([\d.]+)([KMG])\) exceeds|Used ([\d.]+)([KMG]) of")
_ADDRESS = re.compile(r'backend_config = "\d+"')
# How XLA says that its default tiles of a product cannot be had. On a GPU it measures several, and cuBLAS beside them.
_TILES = "find output tile sizes"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# Activations that XLA's GPU compiler holds at most, in parts of the counted ones, by whether logits of attention are held
# (docs/scaling.md).
CALIBRATION = {"flash": 1.2, "logits": 1.5}
# Packages that hold compilers.
COMPILERS = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
CACHE_FORMAT = 6  # of what is kept between plans


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


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage that could run, with descriptions instead of arrays.

    Attributes:
      config: of the whole stage, on data and rewards that stand for the real ones.
      parameters: descriptions of everything that stays on the devices beside what is trained.
    """

    name: str
    config: ConfigDict
    parameters: Any
    programs: list[Program]

    def state(self) -> Any:
        """What is trained and its optimizer: fields of a state."""
        for program in self.programs:
            for role, argument in zip(program.roles, program.arguments):
                if role == "state":
                    return argument._asdict()
        raise ValueError(f"No program of the stage '{self.name}' has a state.")

    def check(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises a ConfigError when its batches do not split over the mesh."""
        try:
            stage_class(self.config.kind).check(self.config, mesh)
        except ValueError as error:
            raise ConfigError(f"config.stages.{self.name}: {error}") from error


def stages(
    config: ConfigDict,
    mesh: Mesh,
    *,
    all_shapes: bool = False,
    shards: int = 1,
    split: Any = None,
    log: Callable[[str], None] = lambda sentence: None,
) -> Iterator[Planned]:
    """Every stage of a schedule, on a model and data that are descriptions.

    Args:
      all_shapes: also the resolutions before the last, and all aspect ratios instead of the square.
      shards: build each stage for one of so many parts of its batch.
      split: the mesh whose batches must come out even; `mesh` by default.
      log: takes what a stage says when it is built.

    Raises:
      ConfigError: for batches that do not come out even, or a kind of stage that has no plan.
    """
    from unipic2_jax.perf.blank_model import abstract_bundle

    precision = PRECISIONS[config.precision]
    for index, name in enumerate(config.schedule):
        stage, model = config.stages[name].copy_and_resolve_references(), config.stages[name].model
        if stage_class(stage.kind).programs is Stage.programs:
            raise ConfigError(
                f"config.stages.{name} is of kind '{stage.kind}', which cannot be planned; leave it out of schedule."
            )
        judged = "editreward" in stage.get("rewards", {})
        with stage.unlocked():
            _without_content(stage, all_shapes)
        planned = Planned(name, stage, None, [])
        planned.check(split or mesh)
        if shards > 1:
            with (stage := stage.copy_and_resolve_references()).unlocked():
                _part_of_batch(name, stage, shards, log)
        context = StageContext(
            name, index, config.seed, mesh, Path("."), log=log, precision=precision, gather=config.parallel.gather
        )
        with recorded():  # parameters are described by passes over a token or two, which no program has
            bundle = abstract_bundle(_sized(config, model), mesh)
        made = stage_class(stage.kind)(stage, bundle, context)
        programs = made.programs()
        # What a flow stage trains lives on in its state alone.
        parameters = {"model": made.frozen if stage.kind == "flow" else bundle.params}
        if judged:
            from unipic2_jax.perf.edit_reward_program import judge_program

            samples = stage.num_prompts * stage.grpo.group_size
            with recorded():
                programs.append(judge_program(mesh, samples, stage.height, stage.width, precision))
            parameters["reward"] = programs[-1].arguments[0]
        yield dataclasses.replace(planned, parameters=parameters, programs=programs)


def _sized(config: ConfigDict, name: str | None) -> ConfigDict:
    """`config.model_config`; a model of `config.models` whose folder is still to be named has text encoders around a transformer
    as large as the run's, since that is what there is beside the run's own."""
    found = model_config(config, name)
    if name is None or found.init or "model" in config.models[name]:
        return found
    transformer = SIZES[config.model].networks["transformer"]
    alike = [
        size
        for size, row in SIZES.items()
        if row.networks["transformer"] == transformer and not FAMILIES[row.family].reader
    ]
    with found.unlocked():
        found.model = alike[0]
    return found


def _without_content(stage: ConfigDict, all_shapes: bool) -> None:
    """Black pictures instead of the stage's data, a reward that is at hand instead of its own, no evaluations, a new LoRA."""
    if stage.kind == "flow":
        pixels = {pixels for _, pixels in stage.resolutions}
        if 0 in pixels:  # the data's own
            task = stage.tasks[0]
            pixels |= {make_examples(stage.data, 0, task).resolution}
        blank = {"resolution": max(pixels), "multiple": math.gcd(MULTIPLE, *pixels), "all_aspects": all_shapes}
        stage.data = ConfigDict({"kind": "blank", **blank})
        stage.validation.data = ConfigDict()
        stage.loader_threads = 0
        if not all_shapes:
            stage.resolutions = ((0.0, stage.resolutions[-1][1]),)
    elif stage.kind == "grpo":
        stage.source = ConfigDict({"kind": "blank", "task": stage.source.get("task", "t2i")})
        stage.rewards = ConfigDict({"shapes_t2i": {"weight": 1.0}})
    if "evaluations" in stage:
        stage.evaluations = ConfigDict()
    if "lora" in stage:
        stage.lora.init = ""


def _part_of_batch(name: str, stage: ConfigDict, shards: int, log: Callable[[str], None]) -> None:
    """The stage as one of `shards` equal parts of its batch is computed."""
    if stage.kind == "flow":
        stage.batch_size //= shards
        return
    samples, parts = stage.num_prompts * stage.grpo.group_size, stage.sampling_batches * shards
    tell_micro_batch(name, stage, shards, log)
    if stage.num_prompts % parts:  # a group is on several chips, each of which has a prompt of it
        stage.num_prompts, stage.grpo.group_size = stage.sampling_batches, samples // parts
    else:
        stage.num_prompts //= shards
    stage.grpo.micro_batch = -(-stage.grpo.micro_batch // shards)


def local_bytes(tree: Any, mesh: Mesh | AbstractMesh) -> float:
    """Bytes that one device of the mesh has of descriptions of arrays."""
    return float(sum(_local(leaf, mesh) for leaf in jax.tree.leaves(tree)))


def _local(leaf: Any, mesh: Mesh | AbstractMesh) -> float:
    """Of one array; an axis that this mesh does not divide is whole, as in `parallel.rules`."""
    sharding, shape = getattr(leaf, "sharding", None), leaf.shape
    if sharding is not None:
        spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
        spec = [names if length % devices_along(mesh, names) == 0 else None for names, length in zip(spec, shape)]
        shape = NamedSharding(mesh, PartitionSpec(*spec)).shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _held(planned: Planned, program: Program, mesh: Mesh | AbstractMesh) -> tuple[float, float, float]:
    """Bytes of parameters, optimizer, and the program's batch on one device."""
    trained, *rest = planned.state().values()
    parameters = local_bytes((planned.parameters, trained), mesh)
    batch = [argument for role, argument in zip(program.roles, program.arguments) if role == "batch"]
    return parameters, local_bytes(rest, mesh), local_bytes(batch, mesh)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stages, and for each of them the costs of its programs and, where these were compiled, the kernels of attention."""

    stages: list[Planned]
    costs: dict[str, list[Cost]]
    attention: dict[str, list[Call]] = dataclasses.field(default_factory=dict)


class Cache:
    """What compiled programs were found to take, in small files; without a folder nothing is kept."""

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = Path(folder) if folder else None

    def key(self, text: str, topology: Topology) -> str:
        """Of a lowered program and everything else that decides how it is compiled."""
        libraries = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", *COMPILERS)]
        parts = [str(CACHE_FORMAT), str(topology), json.dumps(EFFORT), *libraries, text]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key."""
        path = self.folder and self.folder / f"{key}.json"
        return json.loads(path.read_text()) if path and path.is_file() else None

    def write(self, key: str, found: Mapping[str, Any]) -> None:
        """Keeps it. Another plan may be reading: the file appears whole."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{key}.json", json.dumps(found))


def default_cache() -> Path:
    """Beside JAX's own cache where the environment names one, else in the user's."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(named) / "plans" if named else Path.home() / ".cache" / "unipic2_jax" / "plans"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@contextlib.contextmanager
def _settings(values: Mapping[str, Any]) -> Iterator[None]:
    """JAX's settings inside; as options of a program they are spelled differently by every version of it."""
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def compile_program(
    traced: jax.stages.Traced, mesh: Mesh, topology: Topology, cache: Cache, log: Callable[[str], None]
) -> dict[str, Any]:
    """What the compiler says of a program: bytes of its 'arguments', 'results', 'temporary', 'moved', 'collectives' and 'ports',
    and its 'kernels'.

    'moved' and 'collectives' are None where it is too large to be compiled; 'temporary' is then what it would have needed.

    Raises:
      ConfigError: when JAX does not understand what the compiler made.
    """
    lowered = traced.lower()
    # Kernels that are split by a rule of their own stand in the text as the address of that rule, which differs from process to
    # process; what they are asked for stands in the jaxpr.
    asked = sorted({str(sorted(eqn.params.items(), key=str)) for eqn in _attention_calls(traced.jaxpr.jaxpr)})
    key = cache.key("\n".join([_ADDRESS.sub("", lowered.as_text()), *asked]), topology)
    if found := cache.read(key):
        log("kept from before")
        return found
    started = time.perf_counter()
    try:
        with _settings(EFFORT if topology.is_tpu else {}):
            compiled = _compiled(lowered, log)
    except jax.errors.JaxRuntimeError as error:
        if not (too_large := _TOO_LARGE.search(str(error))):
            raise
        number, unit = [x for x in too_large.groups() if x]
        found = {
            "arguments": None,
            "results": None,
            "temporary": float(number) * _UNITS[unit],
            "moved": None,
            "collectives": None,
            "ports": 0.0,
            "kernels": {},
        }
    else:
        memory, module = compiled.memory_analysis(), _module(compiled)
        nodes = [] if topology.is_tpu else [device.process_index for device in mesh.devices.flat]
        found = {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            # The program itself lies in the same memory.
            "temporary": memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
            "moved": module.moved_bytes(),
            "collectives": module.collective_bytes(nodes),
            "ports": module.port_bytes(nodes),
            "kernels": module.kernels(),
        }
    seconds = time.perf_counter() - started
    log(f"compiled in {seconds:.0f} s" + (", too large" if found["moved"] is None else ""))
    cache.write(key, found)
    return found


def _attention_calls(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("dot_product_attention"):
            yield eqn
        for inner in inner_jaxprs(eqn.params.values()):
            yield from _attention_calls(inner)


def _compiled(lowered: jax.stages.Lowered, log: Callable[[str], None]) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _TILES not in str(error):
            raise
    log("products by cuBLAS: Triton's first choice of tiles does not fit one of them, and a GPU would try others")
    return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def _module(compiled: jax.stages.Compiled) -> Module:
    try:
        return Module.read(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"jaxlib {_version('jaxlib')} cannot read a program that libtpu {_version('libtpu')} compiled; install the libtpu "
            f"that belongs to it: pip install 'jax[tpu]=={_version('jax')}'."
        ) from error


def _flops(traced: jax.stages.Traced, chips: int) -> dict[str, float]:
    jaxpr = traced.jaxpr.jaxpr
    return {"flops": jaxpr_flops(jaxpr) / chips, "single": jaxpr_flops(jaxpr, is_single) / chips}


def compiled_cost(
    planned: Planned, program: Program, mesh: Mesh, topology: Topology, cache: Cache, log: Callable[[str], None]
) -> Cost:
    """Of a program compiled for the devices that its arguments are described on."""
    traced = program.function.trace(*program.arguments, **program.keywords)
    found = compile_program(traced, mesh, topology, cache, log)
    parameters, optimizer, batch = _held(planned, program, mesh)
    # Known when it has been compiled only; a new state takes the place of the old one.
    results = found["results"] or 0.0
    return Cost(
        planned.name,
        program.name,
        program.calls,
        parameters,
        optimizer,
        batch,
        results,
        found["temporary"],
        **_flops(traced, topology.count),
        model_flops=program.model_flops / topology.count,
        **{field: found[field] for field in ("moved", "collectives", "ports", "kernels")},
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
    """Of a program that was built and traced for one chip's rows, by arithmetic.

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
            share = None if role == "batch" else _local(leaf, mesh) / whole
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
            own, whole = _local(leaf, mesh), math.prod(leaf.shape) * leaf.dtype.itemsize
            if own < whole:
                sums("reduce-scatter", ("fsdp",), whole)
                sums("all-reduce", ("data",), 2 * own if mesh.shape["data"] > 1 else 0.0)
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
    parameters, optimizer, _ = _held(planned, program, mesh)
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
    found = [Plan([], {}) for _ in splits]
    with use_mesh(mesh):
        built = stages(config, mesh, all_shapes=all_shapes, log=log, shards=topology.count, split=meshes[0])
        for planned in built:
            for made in found:
                made.stages.append(planned)
                made.costs[planned.name] = []
            for program in planned.programs:
                if not only(planned, program):
                    continue
                traced = program.function.trace(*program.arguments, **program.keywords)
                for made, whole, parallel in zip(found, meshes, splits):
                    at_once = parallel.gather == "update"
                    cost = counted_cost(planned, program, traced, whole, topology, flash, at_once)
                    made.costs[planned.name].append(cost)
                log(f"{topology} {planned.name}: {program.name}: counted")
    return found


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
                found.costs[planned.name].append(compiled_cost(planned, program, mesh, topology, cache, say))
            found.attention[planned.name] = list(calls)
            calls.clear()
    return found
