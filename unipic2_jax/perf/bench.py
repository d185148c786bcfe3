"""How long the transformer's passes and training steps take, beside the same work in PyTorch on the same device.

Both sides have the same weights, batch and noise, and what they compute is compared before anything is timed. They are timed
in turn (ours, theirs, ours, ...), so that a machine that slows down slows down both.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unipic2_jax.flow.loss import draw_corruption, flow_losses
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.flow.timesteps import TimestepSampling
from unipic2_jax.models.conditioner import conditioning_with_dropout
from unipic2_jax.models.lora import scaled
from unipic2_jax.models.registry import backbone_of
from unipic2_jax.models.sampling import velocity_fn
from unipic2_jax.models.sd3.lora import init_lora
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig, position_table
from unipic2_jax.optim.optimizer import make_optimizer, merge_params, optimizer_fields, split_params
from unipic2_jax.perf.bench_settings import ALPHA, PICTURES, SHIFT, Settings
from unipic2_jax.perf.topology import Chip
from unipic2_jax.rl.grpo import init_state, make_rollout, make_update
from unipic2_jax.rl.policy import guided_policies

# Relative differences up to which both sides have done the same. Gradients in bfloat16 are the coarsest.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
# Not compared in 16 bits: the square of a small difference, to which rounding adds.
NOISY = {"float32": (), "bfloat16": ("kl",)}

# Does its work once and returns what came of it, on the host.
Runner = Callable[[], dict[str, np.ndarray]]


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


# One program for each shape: XLA takes a minute for a program that draws all weights of a transformer.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(number: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # By the generator that compiles and runs fastest everywhere; of a normal draw its spread matters here alone.
    key, spread = jax.random.fold_in(jax.random.key(0, impl="rbg"), number), 0.02 * 3**0.5
    return jax.random.uniform(key, shape, jnp.float32, -spread, spread).astype(dtype)


def draw_like(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Random parameters in the shapes of a tree, made on the device, always the same: scales about 1, all others about 0.

    No leaf is zero: at their initial values modulations and updates are, and would hide what they multiply.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    dtype = jnp.dtype(dtype)
    drawn = [_drawn(number, tuple(leaf.shape), dtype) for number, (_, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(
        structure, [x + 1 if path[-1].key == "scale" else x for (path, _), x in zip(leaves, drawn)]
    )


def weight_shapes(config: MMDiTConfig) -> Any:
    """Descriptions of a transformer's parameters."""
    patch = (1, config.patch_size, config.patch_size, config.in_channels)
    given = (patch, (1,), (1, 1, config.joint_attention_dim), (1, config.pooled_projection_dim))
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in given]
    return jax.eval_shape(MMDiT(config).init, jax.random.key(0), *given)["params"]


def draw_weights(config: MMDiTConfig, dtype: Any = jnp.float32) -> Any:
    """A transformer's weights, drawn as `draw_like` draws; its position table is the real one."""
    params = draw_like(weight_shapes(config), dtype)
    table = position_table(config.width, config.pos_embed_max_size, config.sample_size // config.patch_size)
    return {**params, "pos_embed": {**params["pos_embed"], "pos_embed": table.astype(dtype)}}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *(
            "lora",
            "latents",
            "references",
            "conditioning",
            "unconditional",
            "corruption",
            "advantages",
            "sigmas",
            "key",
        ),
        "step_noise",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both sides are given, beside weights. Arrays are [B, ...], pictures [B, h, w, C].

    Attributes:
      lora: tree of `models.lora`, float32 and random in every leaf.
      references: [B, R, h, w, C] or None.
      unconditional: the other branch's (context, pooled).
      step_noise: [T, B, h, w, C], what the rollout draws from `key`.
    """

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
    make_lora = lambda weights: init_lora(jax.random.key(0), weights, settings.lora_rank)
    key = next(keys)
    # As `rl.grpo.make_rollout` and `rl.rollout.rollout` draw it.
    steps = jax.random.split(jax.random.split(key)[1], settings.num_steps)
    return Inputs(
        lora=draw_like(jax.eval_shape(make_lora, weight_shapes(config))),
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


@dataclasses.dataclass(frozen=True)
class Work:
    """A jitted function and how it is called again and again.

    Attributes:
      arguments: of the first call, of `Inputs`; of descriptions of those under `jax.eval_shape`.
      roles: of each argument, see `training.stage.ROLES`.
      read: what came of a call, of its results.
      following: the arguments of the next call, of those of a call and its results.
    """

    function: Any
    arguments: Callable[[Inputs], tuple[Any, ...]]
    roles: tuple[str, ...]
    read: Callable[[Any], dict[str, Any]]
    following: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] = lambda arguments, results: arguments

    def runner(self, inputs: Inputs, function: Any = None) -> Runner:
        """Takes its arguments along from call to call.

        Args:
          function: the compiled one, where there is one already.
        """
        arguments, function = self.arguments(inputs), function or self.function

        def run() -> dict[str, np.ndarray]:
            nonlocal arguments
            results = jax.block_until_ready(function(*arguments))
            arguments = self.following(arguments, results)
            return {name: np.asarray(value, np.float32) for name, value in self.read(results).items()}

        return run


class Ours:
    """The works of this project: its transformer, losses, rollout, update and optimizers, jitted.

    Attributes:
      compiled: programs by their work's name that need not be compiled again.
    """

    name = "JAX"

    def __init__(self, settings: Settings, inputs: Inputs):
        self.settings, self.inputs, self.compiled = settings, inputs, {}
        self.dtype = jnp.dtype(settings.dtype)
        self.module = MMDiT(
            settings.transformer,
            dtype=self.dtype,
            remat=settings.remat,
            attention_implementation=settings.attention,
        )

    def runner(self, work: str) -> Runner:
        """The runner of one of WORKS."""
        return self.work(work).runner(self.inputs)

    def work(self, name: str) -> Work:
        """One of WORKS."""
        makers = {
            "product": self._product,
            "forward": self._forward,
            "flow": self._flow,
            "rollout": self._rollout,
            "update": self._update,
        }
        return makers[name]()

    def frozen(self) -> Any:
        """The transformer's weights as networks that are not trained have them."""
        return draw_weights(self.settings.transformer, self.dtype)

    def _product(self) -> Work:
        rows, depth, columns = self.settings.product_shape
        ones = lambda inputs: (jnp.ones((rows, depth), self.dtype), jnp.ones((depth, columns), self.dtype))
        return Work(jax.jit(jnp.matmul), ones, ("batch", "batch"), lambda made: {"product": made[0, :1]})

    def _forward(self) -> Work:
        @jax.jit
        def forward(params, latents, conditioning, references, sigma):
            return velocity_fn(self.module, params, conditioning, references)(latents, sigma)

        def arguments(given: Inputs) -> tuple[Any, ...]:
            return self.frozen(), given.latents, given.conditioning, given.references, given.corruption["sigma"]

        return Work(forward, arguments, ("parameters", *["batch"] * 4), lambda made: {"velocity": made})

    def _flow(self) -> Work:
        fields = flow_optimizer()
        optimizer = make_optimizer(fields, steps=1)

        # Given away as by a stage: PyTorch's optimizer changes its parameters in place too.
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(trained, opt_state, frozen, batch, corruption):
            def loss_fn(trained):
                params = merge_params(trained, frozen)
                conditioning = conditioning_with_dropout(None, None, batch, corruption["drop"])
                velocity = velocity_fn(self.module, params["transformer"], conditioning, batch.get("references"))
                return flow_losses(velocity, batch["latents"], corruption).mean()

            loss, gradients = jax.value_and_grad(loss_fn)(trained)
            changes, opt_state = optimizer.update(gradients, opt_state, trained)
            metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradients)}
            return optax.apply_updates(trained, changes), opt_state, metrics

        def arguments(given: Inputs) -> tuple[Any, ...]:
            params = {"transformer": draw_weights(self.settings.transformer)}
            trained, frozen = split_params(params, fields.trainable, backbone_of(self.module.config).never_trained)
            batch = {
                "latents": given.latents,
                "conditioning": given.conditioning,
                "empty_conditioning": given.unconditional,
            }
            if given.references is not None:
                batch["references"] = given.references
            return trained, optimizer.init(trained), frozen, batch, given.corruption

        roles = ("state", "state", "parameters", "batch", "batch")
        return Work(step, arguments, roles, lambda made: made[2], lambda before, made: (*made[:2], *before[2:]))

    def _policy(self) -> Any:
        def network(params, lora, latents, sigma, inputs):
            conditioning = inputs["conditioning"]
            lora = lora and scaled(lora, ALPHA / self.settings.lora_rank)
            return velocity_fn(self.module, params, conditioning, inputs.get("references"), lora=lora)(latents, sigma)

        return guided_policies(network, self.settings.grpo)[0]

    def _branches(self, given: Inputs) -> dict[str, Any]:
        shared = {} if given.references is None else {"references": given.references}
        branches = {"cond": {"conditioning": given.conditioning, **shared}}
        if self.settings.guidance_scale != 1:
            branches["uncond"] = {"conditioning": given.unconditional, **shared}
        return branches

    def _rollout(self) -> Work:
        function = make_rollout(self._policy(), self.settings.grpo)

        def arguments(given: Inputs) -> tuple[Any, ...]:
            noise = given.corruption["noise"]
            return self.frozen(), given.lora, self._branches(given), noise, given.key, given.sigmas

        roles = ("parameters", "parameters", *["batch"] * 4)
        return Work(function, arguments, roles, lambda made: {"latents": made.latents[-1]})

    def _update(self) -> Work:
        optimizer, sampled = make_optimizer(grpo_optimizer(), steps=1), self._rollout()
        function = make_update(self._policy(), optimizer, self.settings.grpo)

        def arguments(given: Inputs) -> tuple[Any, ...]:
            roll, state = sampled.arguments(given), init_state(given.lora, optimizer)
            if isinstance(given.key, jax.core.Tracer):  # shapes are asked for
                trajectory = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sampled.function.eval_shape(*roll))
            else:
                trajectory = self.compiled.get("rollout", sampled.function)(*roll)
            return roll[0], state, None, trajectory, given.advantages, roll[2]

        roles = ("parameters", "state", *["batch"] * 4)
        return Work(
            function, arguments, roles, lambda made: made[1], lambda before, made: (before[0], made[0], *before[2:])
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """A work's model FLOPs, and the median seconds of each side that did it."""

    work: str
    flops: float
    seconds: Mapping[str, float]


def measure(settings: Settings, sides: Sequence[Any], repeats: int) -> Iterator[Row]:
    """Each work in turn: once on every side to compile it and to compare, once more to warm up, then timed `repeats` times.

    Raises:
      ValueError: when the sides do not compute the same.
    """
    flops = settings.flops()
    for work in settings.works:
        if work not in PICTURES:
            yield time_work(work, flops[work], sides, repeats, settings.dtype)


def time_work(work: str, flops: float, sides: Sequence[Any], repeats: int, dtype: str) -> Row:
    """One work on every side, as `measure`."""
    runners = {side.name: side.runner(work) for side in sides}
    for _ in range(2):
        outputs = {name: runner() for name, runner in runners.items()}
        firm = {side: {name: made[name] for name in made if name not in NOISY[dtype]} for side, made in outputs.items()}
        compare(work, firm, TOLERANCE[dtype])
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            started = time.perf_counter()
            runner()
            seconds[name].append(time.perf_counter() - started)
    return Row(work, flops, {name: statistics.median(each) for name, each in seconds.items()})


def torch_device(platform: str) -> tuple[str | None, str]:
    """(PyTorch's name of the device that JAX uses, or None; in words what a table beside it then holds)."""
    if missing := [name for name in ("torch", "diffusers", "peft") if importlib.util.find_spec(name) is None]:
        return None, f"JAX alone, because {' and '.join(missing)} cannot be imported"
    import torch

    if platform == "cpu":
        return "cpu", f"beside PyTorch {torch.__version__}"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda", f"beside PyTorch {torch.__version__}"
    return None, f"JAX alone, because this PyTorch {torch.__version__} does not see the {platform.upper()}"


def compare(work: str, outputs: Mapping[str, Mapping[str, np.ndarray]], tolerance: float) -> None:
    """Raises a ValueError when what a side has computed differs from the first one's by more than this, relatively."""
    (first, ours), *others = outputs.items()
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
