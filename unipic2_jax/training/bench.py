"""How long the transformer's passes and training steps take, beside the same work in PyTorch on the same device.

Both sides have the same weights, batch and noise, and what they compute is compared before anything is timed. They are timed
in turn (ours, theirs, ours, ...), so that a machine that slows down slows down both.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.flow.timesteps import TimestepSampling
from unipic2_jax.models.attention import IMPLEMENTATIONS
from unipic2_jax.models.lora import init_lora
from unipic2_jax.models.mmdit import MMDiT, MMDiTConfig, position_table
from unipic2_jax.models.remat import POLICIES
from unipic2_jax.models.sizes import SIZES
from unipic2_jax.pipelines.sampling import velocity_fn
from unipic2_jax.rl.config import GRPOConfig
from unipic2_jax.rl.rollout import guided_policies
from unipic2_jax.rl.update import init_state, make_rollout, make_update
from unipic2_jax.training.config import optimizer_fields
from unipic2_jax.training.flops import flow_step_flops, forward_flops, grpo_step_flops
from unipic2_jax.training.flow import draw_corruption, flow_losses
from unipic2_jax.training.optimizer import make_optimizer, merge_params, split_params
from unipic2_jax.training.topology import Chip

# SD3.5-Medium in small: the same heads and parts, a third of the depth and half the width. About 130M parameters, so that a
# training step takes seconds on two cores.
MID = MMDiTConfig(
    sample_size=64,
    num_layers=6,
    num_attention_heads=12,
    joint_attention_dim=1024,
    caption_projection_dim=768,
    pooled_projection_dim=768,
    pos_embed_max_size=64,
    dual_attention_layers=(0, 1, 2),
)
TRANSFORMERS = {"mid": MID, **{name: sizes.transformer for name, sizes in SIZES.items()}}
WORKS = ("product", "forward", "flow", "rollout", "update")
DTYPES = ("float32", "bfloat16")
DOWNSAMPLING, SHIFT, ALPHA = 8, 3.0, 64.0  # of SD3.5's VAE and schedule, of the paper's LoRA
# Relative differences up to which both sides have done the same. Gradients in bfloat16 are the coarsest.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}

# Does its work once and returns what came of it, on the host.
Runner = Callable[[], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      size: of the transformer, one of TRANSFORMERS.
      height, width: of the pictures, pixels.
      batch: samples.
      references: pictures that an edit starts from, as large as the target.
      text_tokens: of the conditioning.
      lora_rank: of rollout and update; num_steps: of the rollout, of which the update trains all but the last.
      guidance_scale: of both; 1 for none.
      dtype: of the arithmetic. Weights that are trained are float32, frozen ones have this dtype.
      remat: what of a block is kept for the backward pass, see `models.remat`; PyTorch checkpoints blocks under 'full'.
      attention: see `models.attention`; PyTorch's is its scaled_dot_product_attention.
      works: which of WORKS.

    Raises:
      ValueError: when a value is not possible.
    """

    size: str = "mid"
    height: int = 256
    width: int = 256
    batch: int = 4
    references: int = 1
    text_tokens: int = 154
    lora_rank: int = 32
    num_steps: int = 3
    guidance_scale: float = 1.0
    dtype: str = "float32"
    remat: str = "dots"
    attention: str = "auto"
    works: Sequence[str] = WORKS

    def __post_init__(self) -> None:
        known = {"size": TRANSFORMERS, "dtype": DTYPES, "attention": IMPLEMENTATIONS, "remat": tuple(POLICIES)}
        for field, names in known.items():
            if getattr(self, field) not in names:
                raise ValueError(f"There is no {field} '{getattr(self, field)}'; choose one of {', '.join(names)}.")
        if unknown := [work for work in self.works if work not in WORKS]:
            raise ValueError(f"There is no work '{unknown[0]}'; choose from {', '.join(WORKS)}.")
        least = {"batch": 1, "references": 0, "text_tokens": 1, "lora_rank": 1, "num_steps": 2}
        for field, low in least.items():
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {low}.")
        pixels = DOWNSAMPLING * self.transformer.patch_size
        most = pixels * self.transformer.pos_embed_max_size
        for field in ("height", "width"):
            if not 0 < getattr(self, field) <= most or getattr(self, field) % pixels:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; '{self.size}' takes multiples of {pixels} up to {most} pixels."
                )

    @property
    def transformer(self) -> MMDiTConfig:
        """Its sizes."""
        return TRANSFORMERS[self.size]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of the batch, [B, h, w, C]."""
        height, width = self.height // DOWNSAMPLING, self.width // DOWNSAMPLING
        return self.batch, height, width, self.transformer.in_channels

    @property
    def tokens(self) -> int:
        """Of one picture."""
        return self.height * self.width // (DOWNSAMPLING * self.transformer.patch_size) ** 2

    @property
    def grpo(self) -> GRPOConfig:
        """One optimizer step on all samples at once."""
        # Updates are repeated with one rollout, so that only the first of them is on-policy.
        return GRPOConfig(
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            updates_per_rollout=1,
            old_log_probs="sampler",
        )

    @property
    def product_shape(self) -> tuple[int, int, int]:
        """Of the matrices that are multiplied, [n, k] x [k, m]: those into the feed-forward layers' hidden units."""
        tokens = self.batch * self.tokens * (1 + self.references)
        return tokens, self.transformer.width, 4 * self.transformer.width

    def flops(self) -> dict[str, int]:
        """Model FLOPs of each work."""
        forward = forward_flops(self.transformer, self.tokens, self.text_tokens, self.tokens * self.references)
        rows, depth, columns = self.product_shape
        evaluations = self.batch * (1 if self.guidance_scale == 1 else 2)
        trained = evaluations * self.grpo.trained_steps
        return {
            "product": 2 * rows * depth * columns,
            "forward": self.batch * forward,
            "flow": flow_step_flops(forward, self.batch, trains_weights=True),
            "rollout": grpo_step_flops(forward, evaluations * self.num_steps, 0, reference=False),
            "update": grpo_step_flops(forward, 0, trained, reference=self.grpo.kl_beta > 0),
        }


def flow_optimizer() -> Any:
    """AdamW of the flow stage, with the paper's fields."""
    fields = optimizer_fields()
    fields.trainable = "^transformer/"
    return fields


def grpo_optimizer() -> Any:
    """Adam of the GRPO stage."""
    fields = optimizer_fields()
    fields.update({"name": "adam", "lr": 3e-4, "betas": (0.9, 0.999), "weight_decay": 0.0})
    return fields


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both sides are given. Arrays are [B, ...], pictures [B, h, w, C].

    Attributes:
      params, lora: trees of the transformer and of `models.lora`, float32 and random in every leaf: at their initial values
        modulations and updates are zero and would hide what they multiply.
      references: [B, R, h, w, C] or None.
      unconditional: the other branch's (context, pooled).
      step_noise: [T, B, h, w, C], what the rollout draws from `key`.
    """

    params: Any
    lora: Any
    latents: jax.Array
    references: jax.Array | None
    conditioning: tuple[jax.Array, jax.Array]
    unconditional: tuple[jax.Array, jax.Array]
    corruption: dict[str, jax.Array]
    advantages: jax.Array
    sigmas: jax.Array
    key: jax.Array
    step_noise: jax.Array


def make_inputs(settings: Settings) -> Inputs:
    """Random ones, always the same."""
    config, shape, batch = settings.transformer, settings.latent_shape, settings.batch
    keys = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32)
    text = lambda: (
        normal(batch, settings.text_tokens, config.joint_attention_dim),
        normal(batch, config.pooled_projection_dim),
    )
    conditioning, unconditional, latents = text(), text(), normal(*shape)

    # Drawn by numpy: a program that draws every leaf takes longer to compile than the training step.
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "pos_embed":
            return position_table(config.width, config.pos_embed_max_size, config.sample_size // config.patch_size)
        noise = rng.standard_normal(leaf.shape, np.float32)
        noise *= 0.02
        return jnp.asarray(noise + 1 if path[-1].key == "scale" else noise)

    weights = jax.eval_shape(
        MMDiT(config).init, jax.random.key(0), latents[:1], jnp.zeros(1), *(x[:1] for x in conditioning)
    )
    updates = jax.eval_shape(lambda tree: init_lora(jax.random.key(0), tree, settings.lora_rank), weights["params"])
    params, lora = (jax.tree_util.tree_map_with_path(draw, tree) for tree in (weights["params"], updates))
    key = next(keys)
    # As `rl.update.make_rollout` and `rl.rollout.rollout` draw it.
    steps = jax.random.split(jax.random.split(key)[1], settings.num_steps)
    return Inputs(
        params=params,
        lora=lora,
        latents=latents,
        references=normal(batch, settings.references, *shape[1:]) if settings.references else None,
        conditioning=conditioning,
        unconditional=unconditional,
        corruption=draw_corruption(next(keys), shape, TimestepSampling(shift=SHIFT)),
        advantages=normal(batch),
        sigmas=FlowMatchConfig(shift=SHIFT).sigmas(settings.num_steps),
        key=key,
        step_noise=jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(steps),
    )


class Ours:
    """The runners of this project: its transformer, losses, rollout, update and optimizers, jitted."""

    name = "JAX"

    def __init__(self, settings: Settings, inputs: Inputs):
        self.settings, self.inputs = settings, inputs
        self.dtype = jnp.dtype(settings.dtype)
        self.module = MMDiT(
            settings.transformer,
            dtype=self.dtype,
            remat=settings.remat,
            lora_alpha=ALPHA,
            attention_implementation=settings.attention,
        )

    def _frozen(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), self.inputs.params)

    def product(self) -> Runner:
        rows, depth, columns = self.settings.product_shape
        left, right = jnp.ones((rows, depth), self.dtype), jnp.ones((depth, columns), self.dtype)
        multiply = jax.jit(jnp.matmul)
        return lambda: {"product": np.asarray(jax.block_until_ready(multiply(left, right))[0, :1], np.float32)}

    def forward(self) -> Runner:
        params, given = self._frozen(), self.inputs

        @jax.jit
        def forward(params, latents, conditioning, references, sigma):
            return velocity_fn(self.module, params, conditioning, references)(latents, sigma)

        sigma = given.corruption["sigma"]
        run = lambda: forward(params, given.latents, given.conditioning, given.references, sigma)
        return lambda: {"velocity": np.asarray(run())}

    def flow(self) -> Runner:
        fields, given = flow_optimizer(), self.inputs
        trained, frozen = split_params({"transformer": given.params}, fields.trainable)
        optimizer = make_optimizer(fields, steps=1)
        batch = {
            "latents": given.latents,
            "conditioning": given.conditioning,
            "empty_conditioning": given.unconditional,
        }
        if given.references is not None:
            batch["references"] = given.references

        # Given away as by a stage: PyTorch's optimizer changes its parameters in place too.
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(trained, opt_state, frozen, batch, corruption):
            def loss_fn(trained):
                params = merge_params(trained, frozen)
                return flow_losses(self.module, None, params, batch, corruption).mean()

            loss, gradients = jax.value_and_grad(loss_fn)(trained)
            changes, opt_state = optimizer.update(gradients, opt_state, trained)
            metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradients)}
            return optax.apply_updates(trained, changes), opt_state, metrics

        state = jax.tree.map(jnp.copy, trained), optimizer.init(trained)

        def run() -> dict[str, np.ndarray]:
            nonlocal state
            *state, metrics = jax.block_until_ready(step(*state, frozen, batch, given.corruption))
            return jax.device_get(metrics)

        return run

    def _policy(self) -> tuple[Any, Any]:
        """(policy, its inputs)."""

        def network(params, lora, latents, sigma, inputs):
            conditioning = inputs["conditioning"]
            return velocity_fn(self.module, params, conditioning, inputs.get("references"), lora=lora)(latents, sigma)

        given = self.inputs
        shared = {} if given.references is None else {"references": given.references}
        branches = {"cond": {"conditioning": given.conditioning, **shared}}
        if self.settings.guidance_scale != 1:
            branches["uncond"] = {"conditioning": given.unconditional, **shared}
        return guided_policies(network, self.settings.grpo)[0], branches

    def _rollout(self, params: Any) -> Callable[[], Any]:
        (policy, branches), given = self._policy(), self.inputs
        rollout = make_rollout(policy, self.settings.grpo)
        return lambda: rollout(params, given.lora, branches, given.corruption["noise"], given.key, given.sigmas)

    def rollout(self) -> Runner:
        run = self._rollout(self._frozen())
        return lambda: {"latents": np.asarray(jax.block_until_ready(run()).latents[-1])}

    def update(self) -> Runner:
        (policy, branches), params = self._policy(), self._frozen()
        optimizer = make_optimizer(grpo_optimizer(), steps=1)
        update = make_update(policy, optimizer, self.settings.grpo)
        trajectory, state = self._rollout(params)(), init_state(self.inputs.lora, optimizer)

        def run() -> dict[str, np.ndarray]:
            nonlocal state
            made = update(params, state, None, trajectory, self.inputs.advantages, branches)
            state, metrics = jax.block_until_ready(made)
            return {name: np.asarray(metrics[name]) for name in ("loss", "kl", "gradient_norm")}

        return run


@dataclasses.dataclass(frozen=True)
class Row:
    """A work's model FLOPs, and the median seconds of each side that did it."""

    work: str
    flops: int
    seconds: Mapping[str, float]


def measure(settings: Settings, sides: Sequence[Any], repeats: int) -> Iterator[Row]:
    """Each work in turn: once on every side to compile it and to compare, once more to warm up, then timed `repeats` times.

    Raises:
      ValueError: when the sides do not compute the same.
    """
    flops = settings.flops()
    for work in settings.works:
        runners = {side.name: getattr(side, work)() for side in sides}
        for _ in range(2):
            compare(work, {name: runner() for name, runner in runners.items()}, TOLERANCE[settings.dtype])
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(repeats):
            for name, runner in runners.items():
                started = time.perf_counter()
                runner()
                seconds[name].append(time.perf_counter() - started)
        yield Row(work, flops[work], {name: statistics.median(each) for name, each in seconds.items()})


def compare(work: str, found: Mapping[str, Mapping[str, np.ndarray]], tolerance: float) -> None:
    """Raises a ValueError when what a side has computed differs from the first one's by more than this, relatively."""
    (first, ours), *others = found.items()
    for side, theirs in others:
        for name, want in theirs.items():
            error = np.linalg.norm(np.subtract(ours[name], want)) / np.linalg.norm(want)
            if not error <= tolerance:
                raise ValueError(
                    f"The {name} of '{work}' differs between {first} and {side} by {error:.1e}, more than {tolerance:.0e}: they do "
                    "different work, so that times say nothing; choose other settings, or repair the difference."
                )


def heading(sides: Sequence[str], chip: Chip | None) -> str:
    """The two first lines of the table whose others are made by `line`."""
    columns = ["work", "TFLOP"]
    for side in sides:
        columns += [f"{side}, s", "TFLOP/s", *(["MFU"] if chip else [])]
    columns += [f"{side} / {sides[0]}" for side in sides[1:]]
    return "\n".join((_cells(columns), _cells(["---"] + ["---:"] * (len(columns) - 1))))


def line(row: Row, chip: Chip | None) -> str:
    """A work's row: TFLOP/s and MFU are of model FLOPs; the last column is above 1 where ours is faster."""
    cells = [row.work, f"{row.flops / 1e12:.4g}"]
    for seconds in row.seconds.values():
        speed = row.flops / seconds
        cells += [f"{seconds:.4g}", f"{speed / 1e12:.3g}", *([f"{speed / chip.flops:.1%}"] if chip else [])]
    ours, *theirs = row.seconds.values()
    return _cells(cells + [f"{seconds / ours:.2f}" for seconds in theirs])


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
