"""What a pipeline is asked for: its arguments checked and broadcast, a request for every picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unipic2_jax.flow.ode import SOLVERS
from unipic2_jax.flow.seeds import folded
from unipic2_jax.models.bundle import Bundle
from unipic2_jax.models.conditioner import check_prompts
from unipic2_jax.pictures import resize as pictures
from unipic2_jax.pictures.decode import to_pil

OUTPUT_TYPES = ("pil", "np", "latent")
REFERENCE_MODES = ("sample", "mode")


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    negative: str
    references: tuple[Image.Image, ...]
    size: tuple[int, int]  # height, width in pixels
    seed: int
    noise: np.ndarray | None  # [h, w, C]


def check_options(
    output_type: str,
    reference_mode: str,
    solver: str,
    negative_prompt: Any,
    guidance_scale: float,
    num_images_per_prompt: int,
    batch_size: int | None,
) -> None:
    """Raises ValueError, one sentence, for an argument of `Pipeline.__call__` that is wrong whatever the pictures are."""
    for name, value, known in (
        ("output_type", output_type, OUTPUT_TYPES),
        ("reference_mode", reference_mode, REFERENCE_MODES),
        ("solver", solver, SOLVERS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(map(repr, known))}.")
    if negative_prompt is not None and guidance_scale <= 1:
        raise ValueError(
            f"negative_prompt changes nothing at guidance_scale {guidance_scale:g}, which is no guidance; raise it, or leave "
            "negative_prompt out."
        )
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}; give a finite number.")
    for name, value in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")


def make_requests(
    bundle: Bundle,
    prompt: str | Sequence[str],
    image: Any,
    negative_prompt: str | Sequence[str] | None,
    height: int | None,
    width: int | None,
    seed: int | Sequence[int],
    num_images_per_prompt: int,
    latents: Any,
    output_type: str,
) -> list[Request]:
    """Checks and broadcasts the arguments of `Pipeline.__call__`, which describes them: one request per picture."""
    prompts = check_prompts(prompt)
    if not prompts:
        raise ValueError("There is no prompt; give at least one.")
    references = _references(image, len(prompts))
    if negative_prompt is None:
        negative_prompt = [bundle.conditioner.default_negative(bool(own)) for own in references]
    check_prompts(negative_prompt, "negative_prompt")
    negatives = _per_prompt(negative_prompt, "negative_prompt", len(prompts))
    count = len(prompts) * num_images_per_prompt
    seeds = _seeds(seed, count)
    if latents is not None:
        latents = _check_latents(bundle, latents, count, height, width)
        height, width = (edge * bundle.vae_scale for edge in latents.shape[1:3])
    sizes = [picture_size(bundle, height, width, own) for own in references]
    if output_type != "pil" and len(set(sizes)) > 1:
        raise ValueError(
            f"The pictures would have different sizes, which output_type {output_type!r} cannot stack; "
            "give height and width, or use 'pil'."
        )
    requests = []
    for k in range(count):
        i = k // num_images_per_prompt
        noise = None if latents is None else latents[k]
        requests.append(Request(prompts[i], negatives[i], references[i], sizes[i], seeds[k], noise))
    return requests


def _check_latents(bundle: Bundle, latents: Any, count: int, height: int | None, width: int | None) -> np.ndarray:
    """Initial noise [N, C, h, w] -> [N, h, w, C], checked."""
    latents = np.asarray(latents, np.float32)
    channels, scale = bundle.transformer.config.in_channels, bundle.vae_scale
    wanted = (count, channels, *(edge // scale if edge else "any" for edge in (height, width)))
    if latents.ndim != 4 or any(w != "any" and w != n for w, n in zip(wanted, latents.shape)):
        raise ValueError(
            f"latents must have the shape [{', '.join(map(str, wanted))}] (pictures, channels, height / {scale}, "
            f"width / {scale}), not {latents.shape}."
        )
    if not np.isfinite(latents).all():
        raise ValueError("latents hold NaN or infinite values; give finite noise.")
    return latents.transpose(0, 2, 3, 1)


def picture_size(
    bundle: Bundle, height: int | None, width: int | None, references: tuple[Image.Image, ...]
) -> tuple[int, int]:
    """(height, width) of the picture made for a prompt with these references."""
    if not references:
        own = (bundle.default_size, bundle.default_size)
    else:
        own = None
        for reference in references:
            # Every reference must be usable, although the first one alone decides on the size.
            fitted = pictures.fit_longer_edge(reference.size[::-1], bundle.default_size, bundle.patch_pixels)
            own = own or fitted
    size = tuple(default if given is None else given for given, default in zip((height, width), own))
    pictures.check_size(*size, bundle.patch_pixels)
    if max(size) > bundle.largest_size:
        raise ValueError(
            f"A picture of {size[1]} x {size[0]} pixels exceeds the model's position table, which ends at "
            f"{bundle.largest_size}; use a smaller size."
        )
    return size


def _per_prompt(values: str | Sequence[str], name: str, count: int) -> list[str]:
    values = [values] * count if isinstance(values, str) else list(values)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts; give one for all, or one per prompt.")
    return values


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per picture."""
    is_whole = lambda value: isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    given = [seed] if is_whole(seed) or not isinstance(seed, Iterable) or isinstance(seed, str) else list(seed)
    if wrong := [value for value in given if not is_whole(value)]:
        raise TypeError(f"A seed is {wrong[0]!r}; seed must be a whole number, or a list of one per picture.")
    seeds = [int(seed) + k for k in range(count)] if is_whole(seed) else [int(s) for s in given]
    if len(seeds) != count:
        raise ValueError(f"There are {len(seeds)} seeds for {count} pictures; give one number, or one per picture.")
    return [folded(s) for s in seeds]


def _references(image: Any, count: int) -> list[tuple[Image.Image, ...]]:
    """The references of each prompt; see `Pipeline.__call__` for the rules."""
    if image is None:
        return [()] * count
    several = isinstance(image, (list, tuple)) or (hasattr(image, "ndim") and image.ndim == 4)
    if not several:
        return [(to_pil(image),)] * count
    entries = list(image)
    if len(entries) != count:
        raise ValueError(
            f"image holds {len(entries)} entries for {count} prompt{'s' if count > 1 else ''}; give one entry per "
            "prompt, and write several references of one prompt as a list within the list: [[a, b]]."
        )
    out = []
    for entry in entries:
        if entry is None:
            out.append(())
        elif isinstance(entry, (list, tuple)):
            out.append(tuple(to_pil(item) for item in entry))
        else:
            out.append((to_pil(entry),))
    return out
