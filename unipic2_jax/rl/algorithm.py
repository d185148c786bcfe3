"""The seam between reinforcement and its algorithms: what a stage, a sampler and a planner ask of one.

An algorithm is a class in a module of its own, which registers it by a name: that name is a kind of stage, and the group of fields
in which such a stage has its hyper-parameters. Everything else of a stage (prompts, rewards, advantages, checkpoints) knows no
algorithm. docs/extending/algorithm.md walks through one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from unipic2_jax.core.registry import Registry
from unipic2_jax.parallel.mesh import replicated
from unipic2_jax.parallel.rules import RULES
from unipic2_jax.rl.config import RLConfig
from unipic2_jax.rl.policy import PolicyFn

# Names of algorithms. A class is an Algorithm.
ALGORITHMS = Registry("reinforcement algorithm")

# In how many parts a step is sampled at most where nobody says it, and how many samples of a part keep a device busy.
MOST_PARTS, SAMPLES_AT_ONCE = 4, 8


class State(Protocol):
    """What changes during a stage: a NamedTuple, and so a plain pytree that can be saved whole. An algorithm may have more in it."""

    @property
    def lora(self) -> Any:
        """What is trained: a LoRA, or parameters of the transformer."""

    @property
    def opt_state(self) -> Any:
        """The optimizer's."""

    @property
    def ema(self) -> Any:
        """The moving average of `lora`, float32."""

    @property
    def step(self) -> jax.Array:
        """Optimizer steps so far, int32."""


class Rollout(Protocol):
    """What sampling leaves for the update: a NamedTuple of arrays."""

    @staticmethod
    def batch_axes() -> Mapping[str, int | None]:
        """Each field's name, and the axis of its samples; None: the field belongs to the batch, and all batches of a step have the same."""

    @property
    def finished(self) -> jax.Array:
        """The samples' latents, [B, ...]."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the samples of a step are arranged: groups side by side.

    Attributes:
      prompts: of a step, each of which has a group.
      batches: in which they are sampled.
      same_latent: a group starts from one noise.
      batch_branches: both branches of guidance are computed in one call.
    """

    prompts: int
    group_size: int
    batches: int = 1
    same_latent: bool = False
    batch_branches: bool = False

    @property
    def samples(self) -> int:
        return self.prompts * self.group_size

    @property
    def prompts_at_once(self) -> int:
        """Prompts of a sampling batch."""
        return self.prompts // self.batches

    @property
    def samples_at_once(self) -> int:
        """Samples of a sampling batch."""
        return self.prompts_at_once * self.group_size


@dataclasses.dataclass(frozen=True)
class Passes:
    """Evaluations of the transformer in a step: samples x noise levels x branches of guidance.

    Attributes:
      sampled: of the rollout.
      trained: of the update, with gradients.
      watched: of the update, without: of the reference and of old policies.
    """

    sampled: int
    trained: int
    watched: int

    def flops(self, forward: int, trains_weights: bool = False) -> tuple[int, int]:
        """FLOPs of the rollout and of the update.

        The backward pass of a LoRA policy is one more forward's worth: gradients go through the frozen matrices and not into
        them. Recomputed activations do not count, as usual for model FLOPs; neither do the VAE and text encoders.

        Args:
          forward: of one evaluation of one sample.
          trains_weights: the transformer's own weights are trained: their gradients are one forward's worth more.
        """
        return forward * self.sampled, forward * (self.trained * (2 + trains_weights) + self.watched)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm with its hyper-parameters, for a stage whose samples are arranged in one way.

    Attributes:
      name: under which it is registered.
      Config: the hyper-parameters. A field that an algorithm has no use for is none of its Config's, or refused by it.
      rollout_type: what `make_rollout`'s function returns.
      stage_defaults: fields of its stages whose defaults are not those of all.

    Raises:
      ValueError: from `__post_init__` of a subclass, when it cannot work with the layout.
    """

    config: RLConfig
    layout: Layout

    name: ClassVar[str]
    Config: ClassVar[type[RLConfig]]
    rollout_type: ClassVar[type[Rollout]]
    stage_defaults: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        """Where an algorithm says what it cannot work with."""

    @classmethod
    def fields(cls) -> dict[str, Any]:
        """The hyper-parameters as fields of a configuration, with their defaults."""
        fields = dataclasses.asdict(cls.Config())
        del fields["weights"]  # they come from the stage's rewards
        # Samples of an update that are computed at once, at least one for each device; 0: all.
        fields["micro_batch"] = 0
        return fields

    @classmethod
    def read(cls, fields: dict[str, Any]) -> RLConfig:
        """The hyper-parameters from such fields and `weights`; `micro_batch` is that of `Config`."""
        return cls.Config(**fields)

    @property
    def micro_batch(self) -> int:
        """Samples that an update computes at once."""
        return self.config.micro_batch or self.layout.samples // self.config.updates_per_rollout

    def init(self, trained: Any, optimizer: optax.GradientTransformation) -> State:
        """The state before the first update, in arrays of its own."""
        raise NotImplementedError

    def behaviour(self, state: Any) -> Any:
        """The weights that samples are drawn under, like `state.lora`."""
        return state.lora

    def make_rollout(self, network_fn: PolicyFn, **options: Any) -> Any:
        """A jitted `(params, trained, inputs, initial_noise [B, ...], key, sigmas [T + 1], part=None) -> Rollout`.

        Args:
          network_fn: one evaluation of the network, of one branch's inputs.
          options: `prepare`, applied to the frozen weights before anything else, and those of `jax.jit`.
        """
        raise NotImplementedError

    def make_update(
        self, network_fn: PolicyFn, optimizer: optax.GradientTransformation, **options: Any
    ) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
        """A jitted `(params, state, reference, rollout, advantages [B], inputs, key) -> (state, metrics)`.

        `reference` is a tree like what is trained, None for the frozen weights alone. Metrics are float32 scalars, among them
        `loss`, and `non_finite`, which is 1 when an optimizer step was left out because of a value that was not finite.
        """
        raise NotImplementedError

    def passes(self, first_step: int | None = None) -> Passes:
        """What a step costs whose rollout has this `first_step`; None: on the average."""
        raise NotImplementedError

    def first_step(self, rollout: Any) -> int:
        """What of a rollout decides how much was computed."""
        del rollout
        return 0

    def remark(self, metrics: Mapping[str, float]) -> str | None:
        """What a person should be told of an update's metrics, once: the rest of a sentence."""
        del metrics
        return None


def algorithm_fields(stage: ConfigDict) -> ConfigDict | None:
    """The group of a stage's fields that are its algorithm's; None where its kind is none."""
    return stage[stage.kind] if stage.kind in ALGORITHMS else None


def sampling_batches(prompts: int, group_size: int, devices: int, processes: int) -> int:
    """In how many parts a step's prompts are sampled where nobody says it, so that a part is scored while the next one is sampled: as
    many as leave each device `SAMPLES_AT_ONCE` samples, which keep it busy, and each process whole groups."""

    def works(parts: int) -> bool:
        samples = prompts // parts * group_size
        whole = prompts % parts == 0 and samples % devices == 0 and prompts // parts % processes == 0
        return whole and samples >= SAMPLES_AT_ONCE * devices

    return next((parts for parts in range(MOST_PARTS, 1, -1) if works(parts)), 1)


def make_algorithm(stage: ConfigDict, devices: int = 1) -> Algorithm:
    """The algorithm of a stage, for so many devices: each of them gets a sample of a micro-batch at least.

    Raises:
      ValueError: one sentence about the fields.
    """
    cls, fields = ALGORITHMS.find(stage.kind), stage[stage.kind].to_dict()
    fields["micro_batch"] = max(fields["micro_batch"], devices) if fields["micro_batch"] else None
    weights = tuple((name, float(options.get("weight", 1.0))) for name, options in stage.rewards.items())
    config = cls.read({**fields, "weights": tuple((name, weight) for name, weight in weights if weight)})
    batches = stage.sampling_batches
    if batches is None:
        batches = sampling_batches(stage.num_prompts, config.group_size, devices, jax.process_count())
    layout = Layout(stage.num_prompts, config.group_size, batches, stage.same_latent, stage.batch_branches)
    return cls(config, layout)


def places(rollout: type[Rollout], mesh: Mesh) -> Rollout:
    """Where the fields of a rollout are: split over the devices along the samples."""
    split = lambda axis: NamedSharding(mesh, RULES.spec(*[None] * axis, "batch"))
    return rollout(
        **{name: replicated(mesh) if axis is None else split(axis) for name, axis in rollout.batch_axes().items()}
    )


def join(sampled: Sequence[tuple[Rollout, Any]]) -> tuple[Rollout, Any]:
    """Rollouts of a step's sampling batches as one, with their conditioning (leading axis B). What is the batch's is the same."""
    rollouts, inputs = zip(*sampled)
    along = lambda axis: lambda *leaves: jnp.concatenate(leaves, axis)

    def together(name: str, axis: int | None) -> Any:
        first, *others = (getattr(rollout, name) for rollout in rollouts)
        return first if axis is None else jax.tree.map(along(axis), first, *others)

    axes = rollouts[0].batch_axes().items()
    return type(rollouts[0])(**{name: together(name, axis) for name, axis in axes}), jax.tree.map(along(0), *inputs)
