"""Text and images in, pictures out, in the words of diffusers."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from unipic2_jax.models import sampling
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.lora import joined
from unipic2_jax.models.sd3.lora_file import Adapter
from unipic2_jax.parallel.mesh import batch_shards, shard_batch
from unipic2_jax.pictures import resize as pictures
from unipic2_jax.pipelines import adapters
from unipic2_jax.pipelines.request import Request, check_options, make_requests

# A progress bar moves about this often during one sampling loop.
SEGMENTS = 10


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
    guidance_scale: float
    sample_references: bool
    resize_references: bool
    output_type: str
    segments: int  # into how many programs the sampling loop is cut
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


class Pipeline:
    """Text-to-image and editing with one model. The jitted programs are compiled once per shape and kept.

    Attributes:
      bundle: the model.
      mesh: pictures are spread over this mesh's 'data' axis (parameters must live on it); None: the default device.
    """

    def __init__(self, bundle: Bundle, mesh: Mesh | None = None):
        self.bundle = bundle
        self.mesh = mesh
        vae = bundle.vae
        self._encode_text = jax.jit(bundle.conditioner.apply)
        self._encode_images = jax.jit(functools.partial(sampling.encode_moments, vae))
        self._references = jax.jit(functools.partial(sampling.reference_latents, vae))
        self._noise = jax.jit(sampling.initial_noise, static_argnums=1)
        steps = bundle.scheduler.num_train_timesteps
        self._denoise = jax.jit(functools.partial(sampling.denoise, bundle.transformer, num_train_timesteps=steps))
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
        self._plain, _ = adapters.fused(self._plain, list(self._loras.values()))
        self._use({})

    def _use(self, loras: dict[str, tuple[Adapter, float]]) -> None:
        self.bundle, self._lora = adapters.applied(self._plain, list(loras.values()))
        self._loras = loras

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
          num_inference_steps: Euler steps.
          guidance_scale: 1 and less switch guidance off.
          seed: picture k of this call uses `seed + k`; or one seed per picture: whole numbers of any size and sign, modulo 2**32.
            A picture depends on its own seed only, not on the batch it is made in.
          latents: initial noise [N, C, height / 8, width / 8] as in diffusers, instead of the seed's.
          output_type: 'pil', 'np' or 'latent'; see `PipelineOutput`.
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
        check_options(output_type, reference_mode, negative_prompt, guidance_scale, num_images_per_prompt, batch_size)
        settings = _Settings(
            {**self.bundle.params, **(params or {})},
            joined(trees) if (trees := [tree for tree in (self._lora, lora) if tree is not None]) else None,
            np.asarray(self.bundle.scheduler.sigmas(num_inference_steps)),
            guidance_scale,
            sample_references=reference_mode == "sample",
            resize_references=resize_references,
            output_type=output_type,
            segments=_segments(num_inference_steps) if progress else 1,
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
        batches = _batches(requests, batch_size)
        made: list[Any] = [None] * len(requests)
        with tqdm(total=len(batches) * settings.steps, unit="step", disable=not progress) as bar:
            for members, size in batches:
                # A short last batch is filled up, so that it does not cost another compilation.
                padded = members + [members[-1]] * (self._padded(size) - len(members))
                for index, picture, finite in zip(members, *self._make([requests[i] for i in padded], settings, bar)):
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

    def _padded(self, count: int) -> int:
        """`count`, or the next multiple of the number of devices."""
        devices = 1 if self.mesh is None else batch_shards(self.mesh)
        return math.ceil(count / devices) * devices

    def _place(self, tree: Any) -> Any:
        """Splits arrays with a leading batch axis over the mesh."""
        return tree if self.mesh is None else jax.tree.map(lambda x: shard_batch(x, self.mesh), tree)

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

        guided = settings.guidance_scale > 1
        texts = [(request.prompt, request) for request in requests]
        if guided:
            texts += [(request.negative, request) for request in requests]
        both = self._text(texts, settings)
        conditioning = jax.tree.map(lambda x: x[: len(requests)], both)
        unconditional = jax.tree.map(lambda x: x[len(requests) :], both) if guided else None
        references, sizes = self._reference_latents(requests, settings, keys)

        latents, conditioning, unconditional, references, sizes = self._place(
            (noise, conditioning, unconditional, references, sizes)
        )
        stride = settings.steps // settings.segments
        for i in range(0, settings.steps, stride):
            latents = self._denoise(
                settings.params["transformer"],
                latents,
                settings.sigmas[i : i + stride + 1],
                conditioning,
                unconditional,
                jnp.float32(settings.guidance_scale),
                references,
                sizes,
                settings.lora,
            )
            if not bar.disable:
                latents.block_until_ready()
            bar.update(stride)
        if settings.as_latents:
            made = np.asarray(latents)
            return made, np.isfinite(made).all(axis=(1, 2, 3))
        whole = settings.output_type == "pil"
        made, finite = map(np.asarray, self._decode(settings.params["vae"], latents, whole=whole))
        return made if whole else pictures.to_unit(made), finite

    def _text(self, texts: list[tuple[str, Request]], settings: _Settings) -> sampling.Conditioning:
        """(context [B, S, J], pooled [B, P]); each different text, with what it is about, is encoded once in a call."""
        conditioner, encoded = self.bundle.conditioner, settings.encoded
        read = lambda request: request.references if conditioner.reads_images else ()
        keys = [(text, *map(id, read(request)), *(request.size if read(request) else ())) for text, request in texts]

        def encode(new: dict[Any, tuple[str, Request]]) -> None:
            items, _ = _unique(list(new.values()), key=id)
            images = [
                [pictures.resized(image, *self._seen_size(request, image, settings)) for image in read(request)]
                for _, request in items
            ]
            tokens = conditioner.tokenize([text for text, _ in items], images)
            encoded.update(zip(new, zip(*map(np.asarray, self._encode_text(settings.params["conditioner"], tokens)))))

        if new := {key: item for key, item in zip(keys, texts) if key not in encoded}:
            encode(new)
        if len({encoded[key][0].shape for key in keys}) > 1:
            # Their contexts are as long as those that they were read with: once more, all together.
            encode(dict(zip(keys, texts)))
        context, pooled = zip(*(encoded[key] for key in keys))
        return np.stack(context), np.stack(pooled)

    def _reference_size(self, request: Request, reference: Image.Image, settings: _Settings) -> tuple[int, int]:
        """(height, width) at which a reference's latents are made."""
        if settings.resize_references:
            return request.size
        return pictures.fit_longer_edge(reference.size[::-1], self.bundle.default_size, self.bundle.patch_pixels)

    def _seen_size(self, request: Request, reference: Image.Image, settings: _Settings) -> tuple[int, int]:
        """(height, width) at which a conditioner reads a reference."""
        return self._reference_size(request, reference, settings) if self.bundle.conditioner.own_sizes else request.size

    def _reference_latents(
        self, requests: list[Request], settings: _Settings, keys: jax.Array
    ) -> tuple[jax.Array | None, np.ndarray | None]:
        """References' latents [B, R, h, w, C] and their sizes [B, R, 2] in latent pixels (None: all alike)."""
        bundle = self.bundle
        count = max(len(request.references) for request in requests)
        if not count or not bundle.conditioner.latent_references:
            return None, None
        # (picture, reference) -> the size it is encoded at.
        slots: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, request in enumerate(requests):
            for r, reference in enumerate(request.references):
                slots.setdefault(self._reference_size(request, reference, settings), []).append((i, r))
        scale = bundle.vae_scale
        grid = tuple(max(size[axis] for size in slots) // scale for axis in (0, 1))
        out = jnp.zeros((len(requests), count, *grid, bundle.vae.config.latent_channels), jnp.float32)
        sizes = np.zeros((len(requests), count, 2), np.int32)
        for (height, width), places in slots.items():
            rows, columns = np.asarray(places).T
            # Several pictures share a reference: it is encoded once.
            unique, index = _unique([requests[i].references[r] for i, r in places], key=id)
            moments = self._encode_images(settings.params["vae"], pictures.to_model(unique, height, width))
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


def _unique(items: list[Any], key: Any = None) -> tuple[list[Any], np.ndarray]:
    """Different items, filled up to a power of two so that few shapes are compiled, and where each item is in them."""
    positions: dict[Any, int] = {}
    unique = []
    index = []
    for item in items:
        name = item if key is None else key(item)
        if name not in positions:
            positions[name] = len(unique)
            unique.append(item)
        index.append(positions[name])
    unique += unique[-1:] * (2 ** math.ceil(math.log2(len(unique))) - len(unique))
    return unique, np.asarray(index)


def _segments(num_steps: int) -> int:
    """Into how many equal parts (one compiled program) a sampling loop is cut to show progress."""
    wanted = max(1, num_steps // SEGMENTS)
    return num_steps // max(length for length in range(1, wanted + 1) if num_steps % length == 0)
