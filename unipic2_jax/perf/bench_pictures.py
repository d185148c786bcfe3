"""How long whole pictures take, text and references in and pixels out, beside diffusers on the same device.

Both sides have the same random weights and noise. Text to image is diffusers' own `StableDiffusion3Pipeline`. For edits it has no
pipeline: its encoders, VAE and scheduler are put together around `bench_torch.joint_velocity`, as the published one is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models.bundle import Bundle, init_params, make_modules
from unipic2_jax.models.family import ModelSizes
from unipic2_jax.models.registry import find_sizes
from unipic2_jax.models.sd3.clip import CLIP_BIGG, CLIP_L
from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.models.sd3.mmdit import position_table
from unipic2_jax.models.sd3.vae import VAEConfig
from unipic2_jax.perf.bench import Row, Runner, draw_like, time_work
from unipic2_jax.perf.bench_settings import MID, PICTURES, SHIFT, Settings
from unipic2_jax.pipelines import Pipeline

PROMPT, NEGATIVE = "a red circle", "a blue square"


def model_sizes(size: str) -> ModelSizes:
    """The networks of a model of this size; those of 'mid' around its transformer are between the tiny and the full ones."""
    tiny = find_sizes("tiny")
    if size != "mid":
        return tiny if size == "tiny" else dataclasses.replace(find_sizes(size), tokenizers=tiny.tokenizers)
    vocabulary = {name: getattr(tiny.networks["text_encoder"], name) for name in ("vocab_size", *_SPECIAL)}
    clip = lambda like, width: dataclasses.replace(
        like, hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=4,
        num_attention_heads=4, **vocabulary,
    )  # fmt: skip
    t5 = dataclasses.replace(tiny.networks["text_encoder_3"], d_model=1024, d_kv=64, d_ff=2048, num_heads=8)
    return ModelSizes(
        "sd3",
        {
            "transformer": MID,
            "vae": VAEConfig(block_out_channels=(32, 64, 128, 128)),
            "text_encoder": clip(CLIP_L, 256),
            "text_encoder_2": clip(CLIP_BIGG, 512),
            "text_encoder_3": t5,
        },
        shift=SHIFT,
        settings={"max_sequence_length": tiny.networks["text_encoder"].max_position_embeddings},
        tokenizers=tiny.tokenizers,
    )


_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def random_model(settings: Settings) -> Bundle:
    """A model of the size in the dtype of the settings. Its weights are random and strong enough that text, noise and reference decide
    about the picture; its position table is the real one."""
    sizes = model_sizes(settings.size)
    modules = make_modules(sizes.networks, sizes.tokenizers(sizes.networks), sizes.settings, settings.dtype)
    shapes = jax.eval_shape(lambda key: init_params(*modules, key), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(_strengthened, draw_like(shapes))
    params, config = jax.tree.map(lambda x: x.astype(settings.dtype), params), settings.transformer
    table = position_table(config.width, config.pos_embed_max_size, config.sample_size // config.patch_size)
    params["transformer"]["pos_embed"]["pos_embed"] = jnp.asarray(table, settings.dtype)
    transformer = modules[0].clone(attention_implementation=settings.attention)
    return Bundle(transformer, *modules[1:], FlowMatchConfig(shift=sizes.shift), params)


def _strengthened(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    """A leaf of `draw_like`, whose spread is 0.02, so that layers neither shrink nor grow what goes through them."""
    if path[-1].key == "scale":
        return leaf
    inputs = 25 if path[-1].key != "kernel" else math.prod(leaf.shape[:-1]) if leaf.ndim == 4 else leaf.shape[-2]
    return leaf / (0.02 * math.sqrt(inputs))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What both sides are asked for: `settings.batch` pictures of one prompt.

    Attributes:
      options: of `Pipeline.__call__` and of diffusers' alike.
      noise: [B, C, h, w].
      source: the picture that edits start from, float32 [H, W, 3] in [0, 1].
    """

    options: dict[str, Any]
    noise: np.ndarray
    source: np.ndarray

    @classmethod
    def by(cls, settings: Settings) -> Asked:
        """What the settings say."""
        rng = np.random.default_rng(0)
        batch, height, width, channels = settings.latent_shape
        options = {"num_inference_steps": settings.num_steps, "guidance_scale": settings.guidance_scale}
        if settings.guidance_scale > 1:
            options["negative_prompt"] = NEGATIVE
        noise = rng.standard_normal((batch, channels, height, width)).astype(np.float32)
        source = rng.integers(0, 256, (settings.height, settings.width, 3)).astype(np.float32) / 255
        return cls(options, noise, source)


def flops(settings: Settings, bundle: Bundle, work: str) -> int:
    """Model FLOPs of the transformer, which are nearly all."""
    references = settings.tokens if work == "edit" else 0
    forward = forward_flops(settings.transformer, settings.tokens, bundle.conditioner.context_length, references)
    return settings.batch * settings.num_steps * forward * (2 if settings.guidance_scale > 1 else 1)


class Ours:
    """`Pipeline` by what a user calls."""

    name = "JAX"

    def __init__(self, settings: Settings, bundle: Bundle):
        self.asked, self.batch, self.pipe = Asked.by(settings), settings.batch, Pipeline(bundle)

    def runner(self, work: str) -> Runner:
        """The runner of one of `bench_settings.PICTURES`."""
        asked = self.asked
        source = {"image": asked.source, "reference_mode": "mode"} if work == "edit" else {}
        given = {**source, **asked.options, "num_images_per_prompt": self.batch, "latents": asked.noise}
        return lambda: {"pictures": self.pipe(PROMPT, output_type="np", **given).images}


def measure(settings: Settings, make_theirs: Callable[[Settings, Bundle], Any] | None, repeats: int) -> Iterator[Row]:
    """Those of `bench_settings.PICTURES` that are asked for, as `bench.measure`.

    Args:
      make_theirs: diffusers' side, where it is there.
    """
    if not (works := [work for work in settings.works if work in PICTURES]):
        return
    bundle = random_model(settings)
    sides = [Ours(settings, bundle), *([] if make_theirs is None else [make_theirs(settings, bundle)])]
    for work in works:
        yield time_work(work, flops(settings, bundle, work), sides, repeats, settings.dtype)
