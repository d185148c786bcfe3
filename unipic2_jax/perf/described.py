"""Stages that could run, with descriptions instead of arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.core.registry import Registry
from unipic2_jax.models.attention import recorded
from unipic2_jax.models.registry import FAMILIES, SIZES
from unipic2_jax.parallel.compat import AbstractMesh
from unipic2_jax.parallel.rules import devices_along
from unipic2_jax.training.config import model_config
from unipic2_jax.training.stage import Program, Stage, StageContext, stage_class
from unipic2_jax.weights.precision import PRECISIONS


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


class Description:
    """How a kind of stage is planned: a subclass registers itself in `DESCRIPTIONS` under that kind."""

    def without_content(self, stage: ConfigDict, all_shapes: bool) -> None:
        """Puts what is at hand in the place of the stage's data and rewards; arrays keep their shapes."""
        raise NotImplementedError

    def part_of_batch(self, name: str, stage: ConfigDict, shards: int, log: Callable[[str], None]) -> None:
        """Makes the stage one that computes one of `shards` equal parts of its batch."""
        raise NotImplementedError

    def parameters(self, made: Stage) -> Any:
        """Descriptions of the parameters that stay on the devices beside what is trained."""
        return made.bundle.params

    def samples(self, stage: ConfigDict) -> tuple[int, int, int]:
        """How many pictures a step's rewards look at, and their height and width."""
        raise NotImplementedError


# Kind of stage -> `Description`; kind of reward that has networks on the mesh -> (mesh, samples, height, width, precision) -> `Program`.
DESCRIPTIONS = Registry("kind of stage that can be planned")
REWARD_PROGRAMS = Registry("reward with a program")


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
        if stage.kind not in DESCRIPTIONS:
            raise ConfigError(
                f"config.stages.{name} is of kind '{stage.kind}', which cannot be planned; leave it out of schedule."
            )
        description = DESCRIPTIONS[stage.kind]
        rewards = {fields.get("kind", kind) for kind, fields in stage.get("rewards", {}).items()}
        with stage.unlocked():
            description.without_content(stage, all_shapes)
            if "evaluations" in stage:
                stage.evaluations = ConfigDict()
            if "lora" in stage:
                stage.lora.init = ""
        planned = Planned(name, stage, None, [])
        planned.check(split or mesh)
        if shards > 1:
            with (stage := stage.copy_and_resolve_references()).unlocked():
                description.part_of_batch(name, stage, shards, log)
        context = StageContext(
            name, index, config.seed, mesh, Path("."), log=log, precision=precision, gather=config.parallel.gather
        )
        with recorded():  # parameters are described by passes over a token or two, which no program has
            bundle = abstract_bundle(_sized(config, model), mesh)
        made = stage_class(stage.kind)(stage, bundle, context)
        programs, parameters = made.programs(), {"model": description.parameters(made)}
        for reward in sorted(rewards & REWARD_PROGRAMS.keys()):
            with recorded():
                program = REWARD_PROGRAMS[reward](mesh, *description.samples(stage), precision)
            programs.append(program)
            parameters[reward] = program.arguments[0]
        yield dataclasses.replace(planned, parameters=parameters, programs=programs)


def _sized(config: ConfigDict, name: str | None) -> ConfigDict:
    """`config.model_config`; a model of `config.models` whose folder is still to be named has text encoders around a transformer
    as large as the run's, since that is what there is beside the run's own."""
    sized = model_config(config, name)
    if name is None or sized.init or "model" in config.models[name]:
        return sized
    transformer = SIZES[config.model].networks["transformer"]
    alike = [
        size
        for size, row in SIZES.items()
        if row.networks["transformer"] == transformer and not FAMILIES[row.family].reader
    ]
    with sized.unlocked():
        sized.model = alike[0]
    return sized


def local_bytes(tree: Any, mesh: Mesh | AbstractMesh) -> float:
    """Bytes that one device of the mesh has of descriptions of arrays."""
    return float(sum(local(leaf, mesh) for leaf in jax.tree.leaves(tree)))


def local(leaf: Any, mesh: Mesh | AbstractMesh) -> float:
    """Bytes of one array on one device; an axis that this mesh does not divide is whole, as in `parallel.rules`."""
    sharding, shape = getattr(leaf, "sharding", None), leaf.shape
    if sharding is not None:
        spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
        spec = [names if length % devices_along(mesh, names) == 0 else None for names, length in zip(spec, shape)]
        shape = NamedSharding(mesh, PartitionSpec(*spec)).shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize


def held(planned: Planned, program: Program, mesh: Mesh | AbstractMesh) -> tuple[float, float, float]:
    """Bytes of parameters, optimizer, and the program's batch on one device."""
    trained, *rest = planned.state().values()
    parameters = local_bytes((planned.parameters, trained), mesh)
    batch = [argument for role, argument in zip(program.roles, program.arguments) if role == "batch"]
    return parameters, local_bytes(rest, mesh), local_bytes(batch, mesh)
