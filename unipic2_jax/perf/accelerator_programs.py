"""The full-size programs that `perf.accelerator` measures: built from random weights, compiled beside each other."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models.registry import SIZES
from unipic2_jax.models.sampling import decode_latents, denoise, encode_images
from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.models.sd3.vae import AutoencoderKL
from unipic2_jax.perf import bench
from unipic2_jax.perf.bench import Inputs, Ours, Work
from unipic2_jax.perf.bench_settings import Settings
from unipic2_jax.perf.counting import count_flops
from unipic2_jax.perf.liveness import measure
from unipic2_jax.perf.topology import GB, Chip, find_chip

# From few bytes to many: a device's peak is that of everything before, and shows a program's own only where it is higher.
PICTURES = ("t2i", "edit")
PROGRAMS = ("forward", *PICTURES, "rollout", "update", "flow")


@dataclasses.dataclass(frozen=True)
class Size:
    """What `--size` stands for.

    Attributes:
      settings: of the programs; flow steps and passes take its batch, the update its micro_batch at a time.
      metaquery: the size of `models.registry` whose vision-language model is looked at.
      steps: of the pictures that are made for their latency.
    """

    settings: Settings
    metaquery: str
    steps: int


SIZE = {
    # 512 x 512 pixels, 77 + 256 tokens of text, the paper's rollout, and what the recipes keep for the backward pass.
    "full": Size(
        Settings(
            size="sd35_medium",
            height=512,
            width=512,
            batch=8,
            micro_batch=4,
            references=0,
            text_tokens=333,
            num_steps=10,
            guidance_scale=3.5,
            dtype="bfloat16",
            remat="full",
        ),
        "unipic2_metaquery",
        50,
    ),
}
# The tiny sizes belong to the shapes world.
if "tiny" in SIZES:
    SIZE["tiny"] = Size(
        Settings(
            size="tiny",
            height=48,
            width=48,
            batch=4,
            micro_batch=2,
            references=0,
            text_tokens=22,
            num_steps=3,
            guidance_scale=1.0,  # half of the program to compile
            dtype="bfloat16",
            remat="full",
        ),
        "tiny_metaquery",
        4,
    )


def sentence(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program.

    Attributes:
      arguments: bytes of those; counted: beside them by `perf.liveness`; said: beside them by the compiler.
      seconds: that the compiler took.
    """

    work: Work
    compiled: Any
    arguments: float
    counted: float
    said: float
    seconds: float


class Check:
    """What the sections share: sizes, inputs, compiled programs, time.

    Args:
      size: one of SIZE.
      batch: instead of the size's own.
      budget_s: seconds after which nothing new is begun.
      log: takes a line of progress.
      programs: that are wanted in the end, so that they are compiled together.
    """

    def __init__(
        self,
        size: str,
        batch: int | None,
        budget_s: float,
        log: Callable[[str], None],
        programs: Sequence[str] = PROGRAMS,
    ):
        self.programs = programs
        self.size, settings = SIZE[size], SIZE[size].settings
        if batch is not None:
            micro = settings.micro_batch if batch % settings.micro_batch == 0 else batch
            settings = dataclasses.replace(settings, batch=batch, micro_batch=micro)
        self.settings, self.log = settings, log
        self.device = jax.devices()[0]
        self.chip: Chip | None = find_chip(self.device)
        self.failures: list[str] = []
        self._ends = time.monotonic() + budget_s
        self._built: dict[str, Built | Exception] = {}

    def left(self) -> float:
        """Seconds."""
        return self._ends - time.monotonic()

    def fail(self, what: str, error: Exception | str) -> str:
        """Notes a failure; the sentence is for the report."""
        self.failures.append(what)
        return f"**{what} failed**: {sentence(error) if isinstance(error, Exception) else error}"

    @functools.cached_property
    def inputs(self) -> Inputs:
        """The inputs of all programs."""
        return bench.make_inputs(self.settings)

    @functools.cached_property
    def ours(self) -> Ours:
        """The works of `perf.bench`."""
        return Ours(self.settings, self.inputs)

    def memory(self, field: str) -> float | None:
        """Bytes of `device.memory_stats()`, where the device counts them."""
        return (self.device.memory_stats() or {}).get(field)

    def work(self, name: str) -> Work:
        """One of PROGRAMS."""
        if name in PICTURES:
            return picture_work(self.ours, self.size.steps, name == "edit")
        return self.ours.work(name)

    def flops(self, name: str) -> float:
        """Model FLOPs of one of PROGRAMS; those of the VAE are counted."""
        settings = self.settings
        if name not in PICTURES:
            return settings.flops()[name]
        edit, vae = name == "edit", autoencoder(settings)
        forward = forward_flops(settings.transformer, settings.tokens, settings.text_tokens, settings.tokens * edit)
        params = vae_shapes(vae)
        found = count_flops(jax.jit(functools.partial(decode_latents, vae)), params, _one(settings.latent_shape))
        if edit:
            pictures = _one((1, settings.height, settings.width, 3))
            found += count_flops(jax.jit(functools.partial(encode_images, vae)), params, pictures)
        return found + 2 * self.size.steps * forward

    def build(self, names: Sequence[str]) -> None:
        """Compiles what is not compiled yet, all at the same time, for as long as there is time."""
        missing = [name for name in names if name not in self._built]
        threads = []
        for name in missing:
            try:
                work = self.work(name)
                described = jax.eval_shape(work.arguments, self.inputs)
                job = (name, work, work.function.trace(*described), jax.tree.leaves(described))
                threads.append(threading.Thread(target=self._compile, args=job, daemon=True))
                threads[-1].start()
            except Exception as error:  # of whatever kind, it belongs into the report
                self._built[name] = error
        for thread in threads:
            thread.join(max(self.left(), 1.0))
        for name in missing:
            self._built.setdefault(name, TimeoutError("it was not compiled in the time that there was"))

    def _compile(self, name: str, work: Work, traced: Any, described: Sequence[Any]) -> None:
        started = time.monotonic()
        try:
            compiled = traced.lower().compile()
            memory = compiled.memory_analysis()
            said = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            shares: list[float | None] = []
            for role, info in zip(work.roles, traced.args_info[0], strict=True):
                shares += [None if role == "batch" else 1.0] * len(jax.tree.leaves(info))
            given = sum(leaf.dtype.itemsize * leaf.size for leaf in described)
            counted = measure(traced, shares, flash=True)
            seconds = time.monotonic() - started
            self._built[name] = Built(work, compiled, given, counted.held + counted.results, said, seconds)
            self.ours.compiled[name] = compiled
            self.log(f"{name} compiled in {seconds:.0f} s")
        except Exception as error:
            self._built[name] = error

    def built(self, name: str) -> Built:
        """A program after `build`. Raises what kept it from being compiled."""
        found = self._built[name]
        if isinstance(found, Exception):
            raise found
        return found

    def too_large(self, name: str) -> str | None:
        """Why a compiled program is not to be run: it needs more memory than there is."""
        found, limit = self.built(name), self.memory("bytes_limit")
        needed = found.arguments + found.said
        if limit is None or needed <= limit:
            return None
        return f"needs {needed / GB:.1f} GB of the {limit / GB:.1f} GB of JAX's pool"


def _one(shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """A batch of one."""
    return jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)


def autoencoder(settings: Settings) -> AutoencoderKL:
    """The VAE of the settings' size."""
    dtype = jnp.dtype(settings.dtype)
    return AutoencoderKL(SIZES[settings.size].networks["vae"], dtype=dtype, param_dtype=dtype)


def vae_shapes(vae: AutoencoderKL) -> Any:
    """Descriptions of its parameters."""
    edge = vae.config.downsampling
    image = _one((1, edge, edge, vae.config.in_channels))
    return jax.eval_shape(vae.init, jax.random.key(0), image)["params"]


def picture_work(ours: Ours, steps: int, edit: bool) -> Work:
    """One picture from noise and conditioning, under guidance and with the VAE; of an edit, its source is encoded first."""
    settings, vae = ours.settings, autoencoder(ours.settings)
    sigmas = FlowMatchConfig(shift=SIZES[settings.size].shift).sigmas(steps)

    @jax.jit
    def make(params, vae_params, noise, conditioning, unconditional, source):
        references = None if source is None else encode_images(vae, vae_params, source)[:, None]
        options = (conditioning, unconditional, settings.guidance_scale, references)
        latents = denoise(ours.module, params, noise, sigmas, *options)
        return decode_latents(vae, vae_params, latents)

    def arguments(given: Inputs) -> tuple[Any, ...]:
        first = lambda tree: jax.tree.map(lambda x: x[:1], tree)
        params = bench.draw_like(vae_shapes(vae), settings.dtype)
        source = jnp.zeros((1, settings.height, settings.width, 3)) if edit else None
        noise, *text = first((given.corruption["noise"], given.conditioning, given.unconditional))
        return ours.frozen(), params, noise, *text, source

    return Work(make, arguments, ("parameters", "parameters", *["batch"] * 4), lambda made: {"picture": made})
