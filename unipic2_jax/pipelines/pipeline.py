"""Text and images in, pictures out, in the words of diffusers."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from unipic2_jax.flow.guidance import check_interval, guided_spans
from unipic2_jax.flow.ode import make_steps, start
from unipic2_jax.models import sampling
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.lora import joined
from unipic2_jax.models.sd3.lora_file import Adapter
from unipic2_jax.parallel.mesh import batch_shards, shard_batch
from unipic2_jax.pictures import resize as pictures
from unipic2_jax.pipelines import adapters
from unipic2_jax.pipelines.request import Request, check_options, make_requests
from unipic2_jax.pipelines.residence import Residence

# A progress bar moves about this often during one sampling loop.
SEGMENTS = 10
# The program of the sampling loop has room for so many steps, or for the next power of two.
LEAST_STEPS = 64


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """`images`: PIL pictures, float32 [N, H, W, 3] in [0, 1] ('np'), or latents [N, C, h, w] ('latent')."""

    images: list[Image.Image] | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Settings:
    """What all pictures of a call share."""

    params: dict[str, Any]
    lora: Any
    sigmas: np.ndarray
    solver: str
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    sample_references: bool
    resize_references: bool
    output_type: str
    # What `_text` has encoded so far in this call.
    encoded: dict[Any, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def as_latents(self) -> bool:
        """Whether nothing is decoded."""
        return self.output_type == "latent"

    @property
    def steps(self) -> int:
        """The number of steps of the sampling loop."""
        return len(self.sigmas) - 1

    @property
    def guided(self) -> bool:
        """Whether there is guidance in any step."""
        return self.guidance_scale > 1

    def spans(self, progress: bool) -> Iterator[tuple[int, int, bool]]:
        """The steps as they are asked for: (first, behind the last, whether they are guided), short ones to show progress."""
        stride = max(1, self.steps // SEGMENTS) if progress else self.steps
        for first, last, guided in guided_spans(self.sigmas, self.guidance_interval):
            for begin in range(first, last, stride):
                yield begin, min(begin + stride, last), guided and self.guided


class Pipeline:
    """Text-to-image and editing with one model. The jitted programs are compiled once per shape and kept.

    Attributes:
      bundle: the model.
      mesh: pictures are spread over this mesh's 'data' axis (parameters must live on it); None: the default device.
      residence: what stays on the device, see `residence.RESIDENT`.
    """

    def __init__(self, bundle: Bundle, mesh: Mesh | None = None, resident: str = "all"):
        self.residence = Residence(resident, bundle.params)
        self.bundle = bundle = self._released(bundle)
        self.mesh = mesh
        vae = bundle.vae
        self._encode_text = jax.jit(bundle.conditioner.apply)
        self._encode_images = jax.jit(functools.partial(sampling.encode_moments, vae))
        self._references = jax.jit(functools.partial(sampling.reference_latents, vae))
        self._noise = jax.jit(sampling.initial_noise, static_argnums=1)
        steps = bundle.scheduler.num_train_timesteps
        denoise = functools.partial(sampling.denoise_steps, bundle.transformer, num_train_timesteps=steps)
        self._denoise = jax.jit(denoise, static_argnames="solver")
        self._start = jax.jit(start, static_argnames="solver")
        self._decode = jax.jit(functools.partial(_decoded, vae), static_argnames="whole")
        self._plain = bundle
        self._loras: dict[str, tuple[Adapter, float]] = {}
        self._lora: Any = None

    @property
    def loras(self) -> dict[str, float]:
        """Name -> scale of every LoRA that is loaded."""
        return {name: scale for name, (_, scale) in self._loras.items()}

    def load_lora(self, source: str | os.PathLike, scale: float = 1.0, name: str | None = None) -> None:
        """Adds a LoRA; several add up. docs/weights.md lists the layouts of files that are read.

        Args:
          source: file, folder or hub id.
          scale: what the file's own scale is multiplied by.
          name: to unload it by; the file's or folder's by default. One of the same name is replaced.

        Raises:
          FileNotFoundError, ValueError: one sentence, about a file that is missing or does not fit the model.
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale is {scale!r}; give a finite number.")
        adapter = adapters.read(self._plain, source)
        self._use({**self._loras, name or Path(source).stem: (adapter, float(scale))})

    def unload_lora(self, name: str | None = None) -> None:
        """Takes away the LoRA of this name, or all.

        Raises:
          ValueError: there is none of this name.
        """
        if name is not None and name not in self._loras:
            known = ", ".join(self._loras) or "none"
            raise ValueError(f"There is no LoRA named {name!r}; loaded are: {known}.")
        self._use({} if name is None else {key: own for key, own in self._loras.items() if key != name})

    def fuse_lora(self) -> None:
        """Merges all LoRAs into the model's weights, for good: they are as fast as no LoRA."""
        self._plain = self._released(adapters.fused(self._plain, list(self._loras.values()))[0])
        self._use({})

    def _use(self, loras: dict[str, tuple[Adapter, float]]) -> None:
        bundle, self._lora = adapters.applied(self._plain, list(loras.values()))
        self.bundle, self._loras = self._released(bundle), loras

    def _released(self, bundle: Bundle) -> Bundle:
        return bundle.replace(params=self.residence.released(bundle.params))

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        latents: Any = None,
        output_type: str = "pil",
        *,
        solver: str = "euler",
        guidance_interval: tuple[float, float] | None = None,
        reference_mode: str = "sample",
        resize_references: bool = True,
        params: dict[str, Any] | None = None,
        lora: Any = None,
        batch_size: int | None = None,
        progress: bool = False,
        on_image: Callable[[int, Image.Image], None] | None = None,
    ) -> PipelineOutput:
        """Makes `num_images_per_prompt` pictures for every prompt, the pictures of one prompt next to each other.

        Args:
          prompt: one or several.
          image: what to edit. One picture (PIL, path, or array, see `pictures.decode.to_pil`) serves all prompts. A list (or an
            array [N, H, W, 3]) holds one entry per prompt; an entry is a picture, a list of pictures when the prompt
            has several references, or None when it has none. One prompt with two references: `[[a, b]]`.
          negative_prompt: one for all, or one per prompt; None: the conditioner's own, which is empty for text-to-image and the
            published quality string for edits. Without guidance there is no place for one.
          height, width: pixels. Without them a generated picture has the model's default size, which is 512 for a model of
            full size, and an edit follows its first reference: that for its longer edge, edges rounded to 32.
          num_inference_steps: evaluations of the transformer, twice that under guidance.
          guidance_scale: 1 and less switch guidance off.
          seed: picture k of this call uses `seed + k`; or one seed per picture: whole numbers of any size and sign, modulo 2**32.
            A picture depends on its own seed only, not on the batch it is made in.
          latents: initial noise [N, C, height / 8, width / 8] as in diffusers, instead of the seed's.
          output_type: 'pil', 'np' or 'latent'; see `PipelineOutput`.
          solver: 'euler', or of second order 'dpm2' or 'unipc', which need fewer steps: diffusers' FlowMatchEulerDiscreteScheduler,
            and its DPMSolverMultistepScheduler and UniPCMultistepScheduler with flow sigmas. See `flow.ode`.
          guidance_interval: (low, high) noise levels between which there is guidance, as (0.2, 0.9); outside of them the
            unconditional branch is not evaluated. None: everywhere.
          reference_mode: 'sample' draws reference latents from the VAE's posterior as the published pipeline does;
            'mode' takes its mean.
          resize_references: True resizes references to the target's size (the published rule); False keeps each one's
            aspect ratio.
          params: replaces the bundle's parameters, wholly or by component ('transformer', 'vae', 'conditioner').
          lora: LoRA tree for the transformer (`models.lora`), beside those of `load_lora`.
          batch_size: at most this many pictures at a time; all of one size at once by default.
          progress: show a progress bar.
          on_image: called with (k, picture k) as soon as it is made, but not for latents.

        Raises:
          ValueError, TypeError, FileNotFoundError: one sentence about the argument, before anything is computed.
        """
        check_options(
            output_type, reference_mode, solver, negative_prompt, guidance_scale, num_images_per_prompt, batch_size
        )
        check_interval(guidance_interval, guidance_scale)
        settings = _Settings(
            {**self.bundle.params, **(params or {})},
            joined(trees) if (trees := [tree for tree in (self._lora, lora) if tree is not None]) else None,
            np.asarray(self.bundle.scheduler.sigmas(num_inference_steps, solver)),
            solver,
            guidance_scale,
            guidance_interval,
            sample_references=reference_mode == "sample",
            resize_references=resize_references,
            output_type=output_type,
        )
        given = (prompt, image, negative_prompt, height, width, seed, num_images_per_prompt, latents, output_type)
        requests = make_requests(self.bundle, *given)
        made = self._pictures(requests, settings, batch_size, progress, on_image)
        if output_type == "pil":
            return PipelineOutput(made)
        return PipelineOutput(np.stack(made).transpose(0, 3, 1, 2) if settings.as_latents else np.stack(made))

    def _pictures(
        self,
        requests: list[Request],
        settings: _Settings,
        batch_size: int | None,
        progress: bool,
        on_image: Callable[[int, Image.Image], None] | None,
    ) -> list[Any]:
        """The picture of each request, PIL or array as the output type wants it, made in batches of one size.

        Raises:
          ValueError: when a value is not finite.
        """
        devices = 1 if self.mesh is None else batch_shards(self.mesh)
        # Filled up to few sizes, so that another number of prompts and a short last batch cost no compilation.
        batches = [
            (
                members,
                [requests[i] for i in members + [members[-1]] * (_padded(size, batch_size, devices) - len(members))],
            )
            for members, size in _batches(requests, batch_size)
        ]
        made: list[Any] = [None] * len(requests)
        # All at once, so that the encoders need to be on the device once.
        with self.residence.on_device("conditioner", settings.params) as params:
            for _, padded in batches:
                self._text(padded, dataclasses.replace(settings, params=params))
        with tqdm(total=len(batches) * settings.steps, unit="step", disable=not progress) as bar:
            for members, padded in batches:
                for index, picture, finite in zip(members, *self._make(padded, settings, bar)):
                    if not finite:
                        raise ValueError(
                            f"The model gave NaN or infinite values for the prompt {requests[index].prompt!r}; "
                            "check the checkpoint, or load it with dtype float32."
                        )
                    pil = None if settings.as_latents else _picture(picture)
                    made[index] = pil if settings.output_type == "pil" else picture
                    if on_image is not None and pil is not None:
                        on_image(index, pil)
        return made

    def _make(self, requests: list[Request], settings: _Settings, bar: tqdm) -> tuple[np.ndarray, np.ndarray]:
        """For requests of one size pictures [B, H, W, 3], of 8 bits or as floats in [0, 1], or latents [B, h, w, C]; and which of
        them are finite, bool [B]."""
        bundle = self.bundle
        height, width = requests[0].size
        scale = bundle.vae_scale
        shape = (height // scale, width // scale, bundle.transformer.config.in_channels)
        keys = sampling.image_keys(np.asarray([request.seed for request in requests], np.uint32))
        given = requests[0].noise is not None
        noise = np.stack([request.noise for request in requests]) if given else self._noise(keys, shape)

        both = self._text(requests, settings)
        conditioning = jax.tree.map(lambda x: x[: len(requests)], both)
        unconditional = jax.tree.map(lambda x: x[len(requests) :], both) if settings.guided else None
        references, sizes = self._reference_latents(requests, settings, keys)

        batch = (noise, conditioning, unconditional, references, sizes)
        if self.mesh is not None:
            batch = jax.tree.map(lambda x: shard_batch(x, self.mesh), batch)
        noise, conditioning, unconditional, references, sizes = batch
        state = self._start(noise, solver=settings.solver)
        steps = make_steps(settings.sigmas, settings.solver, max(LEAST_STEPS, _power_of_two(settings.steps)))
        for first, last, guided in settings.spans(progress=not bar.disable):
            state = self._denoise(
                settings.params["transformer"],
                state,
                steps,
                np.int32(first),
                np.int32(last),
                conditioning,
                unconditional if guided else None,
                jnp.float32(settings.guidance_scale),
                references,
                sizes,
                settings.lora,
                solver=settings.solver,
            )
            if not bar.disable:
                state[0].block_until_ready()
            bar.update(last - first)
        if settings.as_latents:
            made = np.asarray(state[0])
            return made, np.isfinite(made).all(axis=(1, 2, 3))
        whole = settings.output_type == "pil"
        with self.residence.on_device("vae", settings.params) as params:
            made, finite = map(np.asarray, self._decode(params["vae"], state[0], whole=whole))
        return made if whole else pictures.to_unit(made), finite

    def _text(self, requests: list[Request], settings: _Settings) -> sampling.Conditioning:
        """(context [B, S, J], pooled [B, P]) of the prompts, and of the negative prompts behind them where there is guidance.

        Each different text, with what it is about, is encoded once in a call.
        """
        conditioner, encoded = self.bundle.conditioner, settings.encoded
        texts = [(request.prompt, request) for request in requests]
        if settings.guided:
            texts += [(request.negative, request) for request in requests]
        read = lambda request: request.references if conditioner.reads_images else ()
        keys = [(text, *map(id, read(request)), *(request.size if read(request) else ())) for text, request in texts]

        def encode(new: dict[Any, tuple[str, Request]]) -> None:
            # As many rows whether three prompts or four come with one negative prompt: few shapes are compiled.
            prompts = sum(key in new for key in dict.fromkeys(keys[: len(requests)]))
            rows = _power_of_two(sum(_power_of_two(n) for n in (prompts, len(new) - prompts) if n))
            items = list(new.values())
            items += items[-1:] * (rows - len(items))
            images = [
                [pictures.resized(image, *_seen_size(self.bundle, request, image, settings)) for image in read(request)]
                for _, request in items
            ]
            tokens = conditioner.tokenize([text for text, _ in items], images)
            with self.residence.on_device("conditioner", settings.params) as params:
                encoded.update(zip(new, zip(*map(np.asarray, self._encode_text(params["conditioner"], tokens)))))

        if new := {key: item for key, item in zip(keys, texts) if key not in encoded}:
            encode(new)
        if len({encoded[key][0].shape for key in keys}) > 1:
            # Their contexts are as long as those that they were read with: once more, all together.
            encode(dict(zip(keys, texts)))
        context, pooled = zip(*(encoded[key] for key in keys))
        return np.stack(context), np.stack(pooled)

    def _reference_latents(
        self, requests: list[Request], settings: _Settings, keys: jax.Array
    ) -> tuple[jax.Array | None, np.ndarray | None]:
        """References' latents [B, R, h, w, C] and their sizes [B, R, 2] in latent pixels (None: all alike)."""
        bundle = self.bundle
        count = max(len(request.references) for request in requests)
        if not count or not bundle.conditioner.latent_references:
            return None, None
        slots = _reference_slots(bundle, requests, settings)
        scale = bundle.vae_scale
        grid = tuple(max(size[axis] for size in slots) // scale for axis in (0, 1))
        out = jnp.zeros((len(requests), count, *grid, bundle.vae.config.latent_channels), jnp.float32)
        sizes = np.zeros((len(requests), count, 2), np.int32)
        for (height, width), places in slots.items():
            rows, columns = np.asarray(places).T
            # Several pictures share a reference: it is encoded once.
            unique, index = _unique([requests[i].references[r] for i, r in places])
            with self.residence.on_device("vae", settings.params) as params:
                moments = self._encode_images(params["vae"], pictures.to_model(unique, height, width))
            mean, logvar = (moment[index] for moment in moments)
            latents = self._references(mean, logvar, keys[rows] if settings.sample_references else None, columns)
            h, w = latents.shape[1:3]
            out = out.at[rows, columns, :h, :w].set(latents)
            sizes[rows, columns] = h, w
        return out, None if (sizes == grid).all() else sizes


def _decoded(vae: Any, params: Any, latents: jax.Array, whole: bool) -> tuple[jax.Array, jax.Array]:
    """Pictures [B, H, W, 3] of latents, `whole` as uint8 and else as floats about [-1, 1], and whether they were finite [B]."""
    images = sampling.decode_latents(vae, params, latents)
    return pictures.to_uint8(images) if whole else images, jnp.isfinite(images).all(axis=(1, 2, 3))


def _picture(array: np.ndarray) -> Image.Image:
    """A picture [H, W, 3] of 8 bits, or of floats in [0, 1], as PIL's."""
    return Image.fromarray(array) if array.dtype == np.uint8 else pictures.to_pictures(array[None])[0]


def _batches(requests: list[Request], batch_size: int | None) -> list[tuple[list[int], int]]:
    """Numbers of requests that are made together, of one size each, and how many a batch of theirs holds."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.size, []).append(index)
    batches = []
    for members in groups.values():
        chunk = batch_size or len(members)
        batches += [(members[i : i + chunk], min(chunk, len(members))) for i in range(0, len(members), chunk)]
    return batches


def _padded(count: int, most: int | None, devices: int) -> int:
    """The next power of two, or `most` if that is less, as a multiple of the number of devices."""
    count = _power_of_two(count) if most is None else min(most, _power_of_two(count))
    return math.ceil(count / devices) * devices


def _reference_size(bundle: Bundle, request: Request, reference: Image.Image, settings: _Settings) -> tuple[int, int]:
    """(height, width) at which a reference's latents are made."""
    if settings.resize_references:
        return request.size
    return pictures.fit_longer_edge(reference.size[::-1], bundle.default_size, bundle.patch_pixels)


def _reference_slots(
    bundle: Bundle, requests: list[Request], settings: _Settings
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Size -> the (request, reference) whose latents are made at it."""
    slots: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, request in enumerate(requests):
        for r, reference in enumerate(request.references):
            slots.setdefault(_reference_size(bundle, request, reference, settings), []).append((i, r))
    return slots


def _seen_size(bundle: Bundle, request: Request, reference: Image.Image, settings: _Settings) -> tuple[int, int]:
    """(height, width) at which a conditioner reads a reference."""
    return _reference_size(bundle, request, reference, settings) if bundle.conditioner.own_sizes else request.size


def _unique(items: list[Any]) -> tuple[list[Any], np.ndarray]:
    """Different objects, filled up to a power of two so that few shapes are compiled, and where each item is in them."""
    positions: dict[int, int] = {}
    unique = []
    for item in items:
        if id(item) not in positions:
            positions[id(item)] = len(unique)
            unique.append(item)
    index = np.asarray([positions[id(item)] for item in items])
    return unique + unique[-1:] * (_power_of_two(len(unique)) - len(unique)), index


def _power_of_two(count: int) -> int:
    """The least power of two that is not below `count`, which is 1 or more."""
    return 1 << (count - 1).bit_length()
