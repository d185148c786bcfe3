"""Which kernel every network's attention gets on this device, and whether that kernel computes what plain XLA does."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unipic2_jax.models.attention import KERNELS, Call, attention, recorded
from unipic2_jax.models.bundle import init_params, make_modules
from unipic2_jax.models.registry import SIZES
from unipic2_jax.models.sampling import velocity_fn
from unipic2_jax.perf.blank_model import blank_tokenizers

# Relative errors of 16 bits are a few thousandths; a kernel that is wrong is wrong by far more.
TOLERANCE = 2e-2
CALLS = 10  # that are timed together


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention of a network.

    Attributes:
      use: what the network is used for.
      call: shapes and kernel.
      trained: whether gradients go through it in some recipe.
    """

    use: str
    call: Call
    trained: bool

    @property
    def network(self) -> str:
        """The network with its use, for people."""
        return f"{self.call.network}, {self.use}"

    @property
    def shape(self) -> str:
        """The shape, for people."""
        call = self.call
        found = f"{call.operands['query'].shape[0]} x {call.queries} x {call.keys}, {call.heads} heads of {call.width}"
        for name in ("mask", "bias"):
            if (given := call.operands[name]) is not None:
                found += f", {name} {list(given.shape)}"
        return found


def find_cases(size: str, metaquery: str, height: int, width: int, batch: int) -> list[Case]:
    """All that differ, of the networks of two sizes in bfloat16, in the order of a run. Nothing is computed.

    Args:
      size: a model with text encoders; metaquery: one with a vision-language model (`models.registry`).
      height, width: of the pictures, pixels.
      batch: prompts.
    """
    cases: dict[Case, None] = {}

    def note(use: str, trained: bool, function: Callable[..., Any], *arguments: Any) -> None:
        with recorded() as calls:
            jax.eval_shape(function, *arguments)
        cases.update(dict.fromkeys(Case(use, call, trained) for call in calls))

    pictures = [[Image.new("RGB", (width, height))]] * batch
    for name in (size, metaquery):
        transformer, vae, conditioner = modules = _modules(name)
        params = jax.eval_shape(lambda key, modules=modules: init_params(*modules, key), jax.random.key(0))
        apply = lambda params, tokens, conditioner=conditioner: conditioner.apply(params["conditioner"], tokens)
        reads, prompts = conditioner.reads_images, ["x"] * batch
        note("text to image", reads, apply, params, conditioner.tokenize(prompts))
        if reads:
            note("edit", reads, apply, params, conditioner.tokenize(prompts, pictures))

        factor, config = vae.config.downsampling, transformer.config
        latents = _floats(batch, height // factor, width // factor, config.in_channels)
        text = [_floats(batch, conditioner.context_length, config.joint_attention_dim)]
        text += [_floats(batch, config.pooled_projection_dim)]
        references = _floats(batch, 1, *latents.shape[1:])
        sizes = jax.ShapeDtypeStruct((batch, 1, 2), jnp.int32)
        uses = {"text to image": (), "edit": (references,), "edit, references of several sizes": (references, sizes)}

        def denoise(
            params: Any, x: Any, sigma: Any, context: Any, pooled: Any, *more: Any, net: Any = transformer
        ) -> Any:
            return velocity_fn(net, params["transformer"], (context, pooled), *more)(x, sigma)

        for use, more in uses.items():
            given = (latents, _floats(batch), *text, *more)
            note(f"{use}{' with queries' if reads else ''}", True, denoise, params, *given)
        if not reads:
            autoencode = lambda params, x, vae=vae: vae.apply({"params": params["vae"]}, x)
            note("there and back", True, autoencode, params, _floats(batch, height, width, vae.config.in_channels))
    return list(cases)


def _modules(size: str) -> tuple[Any, Any, Any]:
    """(transformer, VAE, conditioner), computing in bfloat16, with tokenizers that know no words."""
    sizes = SIZES[size]
    return make_modules(sizes.networks, blank_tokenizers(sizes.networks), dict(sizes.settings), jnp.bfloat16)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def measured_kernel() -> str:
    """The kernel that this device has beside XLA's own attention, or 'xla' where there is none."""
    return next((name for name, platform in KERNELS.items() if platform == jax.default_backend()), "xla")


def worth_measuring(cases: list[Case]) -> list[Case]:
    """One for each shape that has the device's kernel, with gradients where some network of the shape is trained, the largest
    first; on a device without a kernel of its own one for each network.
    """
    if measured_kernel() == "xla":
        return list({case.network: case for case in reversed(cases)}.values())[::-1]
    found: dict[str, Case] = {}
    for case in cases:
        if case.call.implementation == measured_kernel():
            before = found.setdefault(case.shape, case)
            found[case.shape] = dataclasses.replace(before, trained=before.trained or case.trained)
    size = lambda case: case.call.operands["query"].shape[0] * case.call.heads * case.call.queries * case.call.keys
    return sorted(found.values(), key=size, reverse=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one kernel did on one case.

    Attributes:
      value, gradient: relative errors against XLA in float32, the largest one of query, key and value; None: not trained.
      forward, both: seconds of a pass, and of a pass with gradients.
    """

    value: float
    gradient: float | None
    forward: float
    both: float | None

    @property
    def error(self) -> float:
        """The larger one; not a number when one is."""
        return float(np.max([self.value, self.gradient or 0.0]))


def draw(case: Case) -> tuple[jax.Array | None, ...]:
    """(query, key, value, weight of each element of the result, mask, bias), random."""
    operands, keys = case.call.operands, iter(jax.random.split(jax.random.key(0), 6))
    normal = lambda like: jax.random.normal(next(keys), like.shape, jnp.float32).astype(like.dtype)
    arrays = [normal(operands[name]) for name in ("query", "key", "key", "query")]
    mask, bias = operands["mask"], operands["bias"]
    # Three of four keys are seen, and the first by all.
    seen = None if mask is None else jax.random.bernoulli(next(keys), 0.75, mask.shape).at[..., 0].set(True)
    return (*arrays, seen, None if bias is None else normal(bias))


def describe(case: Case) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """`draw`, without the arrays."""
    return jax.eval_shape(lambda: draw(case))


def _forward(kernel: str, *arrays: jax.Array | None) -> jax.Array:
    query, key, value, _, mask, bias = arrays
    return attention(query, key, value, mask=mask, bias=bias, implementation=kernel)


def _both(kernel: str, *arrays: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The value, and the gradients of query, key and value."""
    out, backward = jax.vjp(lambda *given: _forward(kernel, *given, *arrays[3:]), *arrays[:3])
    return out, backward(arrays[3])


def functions(case: Case, kernel: str) -> dict[str, Any]:
    """Jitted functions of the arrays of `draw`: 'forward', a pass, and where the case is trained 'both', a pass with gradients."""
    made = {"forward": jax.jit(functools.partial(_forward, kernel))}
    return made | ({"both": jax.jit(functools.partial(_both, kernel))} if case.trained else {})


def truth_function(case: Case) -> Any:
    """A jitted function of the same arrays: XLA's attention of the first sample in float32, with gradients where the case is trained."""

    @jax.jit
    def truth(*arrays: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        *given, mask, bias = (None if x is None else x[:1] for x in arrays)
        given = [x.astype(jnp.float32) for x in given]
        with jax.default_matmul_precision("highest"):
            return _both("xla", *given, mask, bias) if case.trained else (_forward("xla", *given, mask, bias), ())

    return truth


def outcome(compiled: Mapping[str, Any], arrays: tuple[jax.Array | None, ...], truth: Any) -> Outcome:
    """The outcome of compiled `functions`; `truth` is what `truth_function` gave."""
    wanted, gradients = truth
    value, gradient, both = relative_error(compiled["forward"](*arrays)[:1], wanted), None, None
    if "both" in compiled:
        _, found = compiled["both"](*arrays)
        gradient = float(np.max([relative_error(ours[:1], want) for ours, want in zip(found, gradients, strict=True)]))
        both = seconds(compiled["both"], arrays)
    return Outcome(value, gradient, seconds(compiled["forward"], arrays), both)


def relative_error(found: jax.Array, wanted: jax.Array) -> float:
    """||found - wanted|| / ||wanted||."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def seconds(function: Any, arguments: tuple[Any, ...], repeats: int = 3) -> float:
    """Seconds of a call, when many follow each other: the median of a few rows of them."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(CALLS):
            made = function(*arguments)
        jax.block_until_ready(made)
        found.append((time.perf_counter() - started) / CALLS)
    return statistics.median(found)


def kernel_lines(cases: list[Case]) -> Iterator[str]:
    """The table of which kernel each has."""
    yield "| network | samples x queries x keys | kernel | |\n|---|---|---|---|"
    for case in cases:
        yield f"| {case.network} | {case.shape} | {case.call.implementation} | {case.call.reason or ''} |"


def outcome_heading(kernels: list[str]) -> str:
    """The heading of the table whose rows are `outcome_line`'s."""
    cells = ["network", "samples x queries x keys"]
    for kernel in kernels:
        cells += [f"{kernel}: error of values", "of gradients", "forward, ms", "with gradients, ms"]
    if len(kernels) > 1:
        cells += [f"{kernels[1]} / {kernels[0]}, forward", "with gradients"]
    return f"| {' | '.join(cells)} |\n|---|---|{'---:|' * (len(cells) - 2)}"


def outcome_line(case: Case, found: list[Outcome]) -> str:
    """A row; ratios of times are above 1 where the first kernel is faster."""
    show = lambda number, text, scale=1.0: "-" if number is None else format(number * scale, text)
    cells = [case.network, case.shape]
    for each in found:
        cells += [show(each.value, ".1e"), show(each.gradient, ".1e")]
        cells += [show(each.forward, ".3f", 1e3), show(each.both, ".3f", 1e3)]
    if len(found) > 1:
        first, second = found[:2]
        cells += [f"{second.forward / first.forward:.2f}"]
        cells += ["-" if first.both is None else f"{second.both / first.both:.2f}"]
    return f"| {' | '.join(cells)} |"
