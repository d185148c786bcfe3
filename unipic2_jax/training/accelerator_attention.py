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
from unipic2_jax.models.sizes import SIZES
from unipic2_jax.pipelines.blank import BlankProcessor, BlankTokenizer
from unipic2_jax.pipelines.bundle import TOKENIZERS, init_params, make_modules

# Relative errors of 16 bits are a few thousandths; a kernel that is wrong is wrong by far more.
TOLERANCE = 2e-2
CALLS = 10  # that are timed together


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention of a network.

    Attributes:
      network: and what it is used for.
      call: shapes and kernel.
      trained: whether gradients go through it in some recipe.
    """

    network: str
    call: Call
    trained: bool

    @property
    def shape(self) -> str:
        """For people."""
        (batch, queries, heads, width), keys = self.call.query, self.call.key[1]
        found = f"{batch} x {queries} x {keys}, {heads} heads of {width}"
        for name in ("mask", "bias"):
            if shape := getattr(self.call, name):
                found += f", {name} {list(shape)}"
        return found


def find_cases(size: str, metaquery: str, height: int, width: int, batch: int) -> list[Case]:
    """All that differ, of the networks of two sizes in bfloat16, in the order of a run. Nothing is computed.

    Args:
      size: a model with text encoders; metaquery: one with a language model (`models.sizes`).
      height, width: of the pictures, pixels.
      batch: prompts.
    """
    cases: dict[Case, None] = {}

    def note(network: str, trained: bool, function: Callable[..., Any], *arguments: Any) -> None:
        with recorded() as calls:
            jax.eval_shape(function, *arguments)
        cases.update(dict.fromkeys(Case(network, call, trained) for call in calls))

    pictures = [[Image.new("RGB", (width, height))]] * batch
    for name in (size, metaquery):
        transformer, vae, conditioner = modules = _modules(name)
        params = jax.eval_shape(lambda key, modules=modules: init_params(*modules, key), jax.random.key(0))
        apply = lambda params, tokens, conditioner=conditioner: conditioner.apply(params["conditioner"], tokens)
        reads, prompts = conditioner.reads_images, ["x"] * batch
        who = "Qwen2.5-VL and connector" if reads else "text encoders"
        note(f"{who}, text to image" if reads else who, reads, apply, params, conditioner.tokenize(prompts))
        if reads:
            note(f"{who}, edit", reads, apply, params, conditioner.tokenize(prompts, pictures))

        factor, config = vae.config.downsampling, transformer.config
        latents = _floats(batch, height // factor, width // factor, config.in_channels)
        text = [_floats(batch, conditioner.context_length, config.joint_attention_dim)]
        text += [_floats(batch, config.pooled_projection_dim)]
        references = _floats(batch, 1, *latents.shape[1:])
        sizes = jax.ShapeDtypeStruct((batch, 1, 2), jnp.int32)
        uses = {"text to image": (), "edit": (references,), "edit, references of several sizes": (references, sizes)}

        def denoise(params: Any, *given: Any, transformer: Any = transformer) -> Any:
            return transformer.apply({"params": params["transformer"]}, *given)

        for use, more in uses.items():
            given = (latents, _floats(batch), *text, *more)
            note(f"transformer{' on queries' if reads else ''}, {use}", True, denoise, params, *given)
        if not reads:
            autoencode = lambda params, x, vae=vae: vae.apply({"params": params["vae"]}, x)
            note("VAE", True, autoencode, params, _floats(batch, height, width, vae.config.in_channels))
    return list(cases)


def _modules(size: str) -> tuple[Any, Any, Any]:
    """(transformer, VAE, conditioner), computing in bfloat16, with tokenizers that know no words."""
    sizes = SIZES[size]
    if sizes.vlm is not None:
        tokenizers = BlankProcessor(sizes.vlm)
    else:
        tokenizers = dict.fromkeys(TOKENIZERS, BlankTokenizer(sizes.text_encoder.max_position_embeddings))
    return make_modules(sizes.networks, tokenizers, dict(sizes.settings), jnp.bfloat16)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def measured_kernel() -> str:
    """The kernel that this device has beside XLA's own attention, or 'xla' where there is none."""
    return next((name for name, platform in KERNELS.items() if platform == jax.default_backend()), "xla")


def worth_measuring(cases: list[Case]) -> list[Case]:
    """One for each shape that has the device's kernel, with gradients where some network of the shape is trained; on a device
    without a kernel of its own one for each network.
    """
    if measured_kernel() == "xla":
        return list({case.network: case for case in reversed(cases)}.values())[::-1]
    found: dict[Call, Case] = {}
    for case in cases:
        if case.call.implementation == measured_kernel():
            before = found.get(case.call)
            found[case.call] = dataclasses.replace(
                before or case, trained=case.trained or bool(before and before.trained)
            )
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one kernel on one case.

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
    call, keys = case.call, iter(jax.random.split(jax.random.key(0), 6))
    normal = lambda shape: jax.random.normal(next(keys), shape, jnp.float32).astype(call.dtype)
    arrays = [normal(shape) for shape in (call.query, call.key, call.key, call.query)]
    # Three of four keys are seen, and the first by all.
    mask = None if call.mask is None else jax.random.bernoulli(next(keys), 0.75, call.mask).at[..., 0].set(True)
    return (*arrays, mask, None if call.bias is None else normal(call.bias))


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
    """Of the arrays of `draw`, jitted: 'forward', a pass, and where the case is trained 'both', a pass with gradients."""
    made = {"forward": jax.jit(functools.partial(_forward, kernel))}
    return made | ({"both": jax.jit(functools.partial(_both, kernel))} if case.trained else {})


def truth_function(case: Case) -> Any:
    """Of the same arrays, jitted: XLA's attention of the first sample in float32, with gradients where the case is trained."""

    @jax.jit
    def truth(*arrays: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        *given, mask, bias = (None if x is None else x[:1] for x in arrays)
        given = [x.astype(jnp.float32) for x in given]
        with jax.default_matmul_precision("highest"):
            return _both("xla", *given, mask, bias) if case.trained else (_forward("xla", *given, mask, bias), ())

    return truth


def outcome(compiled: Mapping[str, Any], arrays: tuple[jax.Array | None, ...], truth: Any) -> Outcome:
    """Of compiled `functions`; `truth` is what `truth_function` gave."""
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
    """Of a call, when many follow each other: the median of a few rows of them."""
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
    yield "| network | samples x queries x keys | kernel |\n|---|---|---|"
    for case in cases:
        yield f"| {case.network} | {case.shape} | {case.call.implementation} |"


def outcome_heading(kernels: list[str]) -> str:
    """Of the table whose rows are `outcome_line`'s."""
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
