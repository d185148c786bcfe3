"""What a stage of training is: the seam between the loop and the kinds of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict

from unipic2_jax.core.errors import ConfigError, nearest
from unipic2_jax.core.registry import Registry
from unipic2_jax.data.prompts import PromptSource
from unipic2_jax.models.model import Model
from unipic2_jax.optim.optimizer import optimizer_fields
from unipic2_jax.parallel.rules import shardings
from unipic2_jax.training.timeline import Timeline
from unipic2_jax.weights.precision import PRECISIONS, Precision

# Kinds. A class is a Stage.
STAGES = Registry("kind of stage")


# What is drawn at a stage's start has the key of this step, which no run reaches; a longer run starts with the same.
NO_STEP = 2**32 - 1


@jax.jit
def _key(seed: jax.Array, index: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), step)


@dataclasses.dataclass(frozen=True)
class StageContext:
    """What the loop tells a stage about the run it is in."""

    name: str
    index: int  # place in the schedule
    seed: int
    mesh: jax.sharding.Mesh
    workdir: Path
    next_lora: ConfigDict | None = None  # LoRA fields of the next stage, when that goes on with this one's LoRA
    log: Callable[[str], None] = print  # a sentence for the person who watches
    precision: Precision = PRECISIONS["float32"]
    gather: str = "update"  # config.parallel.gather
    timeline: Timeline = dataclasses.field(default_factory=Timeline)  # of the step that is taken

    @property
    def evaluates(self) -> tuple[jax.sharding.Mesh, Precision, str, Callable[[str], None]]:
        """What `evaluation.evaluator.make_evaluators` wants to know of the run."""
        return self.mesh, self.precision, self.name, self.log

    def key(self, step: int) -> jax.Array:
        """The one source of device randomness: the same (seed, stage, step) always gives the same key."""
        return _key(*jax.device_put([np.uint32(n) for n in (self.seed, self.index, step)]))

    def data_seed(self) -> int:
        """The seed of this stage's data; with the step number it determines a batch."""
        return self.seed * 1000 + self.index


# What an argument of a program holds: what is trained with its optimizer, other parameters, such that the program gathers whole
# before anything else, or something of this step.
ROLES = ("state", "parameters", "gathered", "batch")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled part of a stage's work without the arrays: what `perf.plan` compiles for machines that are not there.

    Attributes:
      function: jitted.
      arguments, keywords: of it, with descriptions of arrays and where they are (`parallel.rules.described`).
      model_flops: of the transformer in a call.
      roles: of each argument, one of `ROLES`.
      calls: in a step of the stage, on the average.
      gradients: how often in a call gradients of what is trained are summed over the devices.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    model_flops: float
    roles: tuple[str, ...]
    calls: float = 1.0
    gradients: int = 0

    @classmethod
    def of(
        cls, name: str, function: Any, held: Sequence[tuple[str, Any]], model_flops: float = 0.0, **fields: Any
    ) -> Program:
        """A program from its arguments in order, each behind its role."""
        roles, arguments = zip(*held)
        return cls(name, function, arguments, {}, model_flops, roles, **fields)


class Stage:
    """One kind of training: its configuration, `check`, `init` (the state), `step`, `evaluate`, `finish`.

    Everything that changes and matters lives in the state, a pytree of arrays, which checkpoints hold. A step is a pure function of
    (state, step number): the data and the random numbers of step n are functions of (seed, stage, n), so the step number is the
    whole data position and a resumed run repeats and skips nothing. What else a stage remembers is a cache: made again from the
    configuration, the state and the step it is the same, bit for bit.
    """

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The fields of a stage of this kind with their defaults."""
        return stage_fields()

    @classmethod
    def check(cls, config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
        """Called for every stage before any work starts.

        Raises:
          ValueError, FileNotFoundError: one sentence about what cannot work.
        """
        del config, mesh

    @classmethod
    def prompt_sources(cls, config: ConfigDict) -> list[PromptSource]:
        """The prompts that a stage of this configuration asks for; a run looks through their pictures before it begins."""
        del config
        return []

    @classmethod
    def continues_lora(cls, config: ConfigDict) -> bool:
        """Whether a stage of this configuration goes on with the LoRA of the stage before, which then does not merge it."""
        del config
        return False

    def __init__(self, config: ConfigDict, bundle: Model, context: StageContext):
        self.config, self.bundle, self.context = config, bundle, context

    def init(self) -> Any:
        """The state before the first step, in arrays of its own: a step gives up those of the state that it is given."""
        raise NotImplementedError

    def release(self) -> None:
        """Called once there is a state: what of the bundle's parameters lives on in it alone is given up here."""

    def place(self, state: Any) -> Any:
        """A state on the mesh, each leaf where the table of parallelism wants it."""
        return jax.device_put(state, shardings(self.context.mesh, state))

    def saved_as(self, state: Any, names: Collection[str]) -> Any:
        """A state of the structure that a checkpoint has, made of a new state; `names` are the paths of the checkpoint's leaves.

        It is another one where the checkpoint is older than something in the state; `restored` then adds that.
        """
        del names
        return state

    def restored(self, state: Any) -> Any:
        """The state, from one of a structure that `saved_as` has given."""
        return state

    def step(self, state: Any, step: int) -> tuple[Any, dict[str, float]]:
        """Does step number `step` (from 0). A metric that has no value in this step is left out, never NaN."""
        raise NotImplementedError

    def evaluate(self, state: Any, step: int) -> dict[str, Any]:
        """Any of 'metrics' {name: float}, 'scores' {name: [a value per prompt]} and 'images' {name: PIL image}.

        'scores' are compared pairwise before and after the stage, so their order and seeds must not depend on `step`.
        """
        del state, step
        return {}

    def programs(self) -> list[Program]:
        """The stage's compiled parts. They need no array: the bundle's parameters may be descriptions of some.

        Raises:
          ConfigError: for a kind of stage that has no plan.
        """
        raise ConfigError(f"Stage '{self.context.name}' is of kind '{self.config.kind}', which cannot be planned.")

    def finish(self, state: Any) -> Model:
        """The model that the next stage starts from; unchanged leaves of `bundle.params` stay the same objects, and what was
        trained is as it was in the state."""
        raise NotImplementedError

    def export(self, state: Any, folder: Path) -> None:
        """Writes what the stage leaves besides its bundle, a LoRA file for example; `folder` exists."""

    def close(self) -> None:
        """Called when the run leaves the stage, however it does: what was asked of threads and not begun is given up here."""


def stage_class(kind: str) -> type[Stage]:
    """The class of a kind.

    Raises:
      ConfigError: for a kind that is not in `STAGES`.
    """
    if kind not in STAGES:
        raise ConfigError(f"'{kind}' is not a kind of stage" + nearest(kind, STAGES))
    return STAGES[kind]


def stage_fields() -> ConfigDict:
    """The fields that stages of every kind have; a kind adds its own to these."""
    return ConfigDict(
        {
            "kind": "",
            # One of config.models, or None for the run's own. It takes over, by name, all that stages before it have trained.
            "model": config_dict.placeholder(str),
            "steps": 1000,
            "save_every": 100,
            "eval_every": 0,  # 0: only before and after the stage
            "log_every": 1,
            "optimizer": optimizer_fields(),
        }
    )
