"""Stable Diffusion 3.5 Medium, and UniPic2-SD3.5M-Kontext, which has the same networks: an MMDiT behind three text encoders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.models.family import Backbone, Family, ModelSizes, Network
from unipic2_jax.models.registry import FAMILIES, NETWORKS, SIZES
from unipic2_jax.models.sd3 import clip_names, lora, mmdit_names, t5_names, vae_names
from unipic2_jax.models.sd3.clip import CLIP_BIGG, CLIP_L, CLIPTextConfig, CLIPTextModelWithProjection
from unipic2_jax.models.sd3.conditioner import TextConditioner, load_tokenizers
from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.models.sd3.t5 import T5Config, T5Encoder
from unipic2_jax.models.sd3.vae import AutoencoderKL, VAEConfig
from unipic2_jax.parallel.rules import PARAMETER_ROWS

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def velocity(
    transformer: MMDiT,
    variables: Mapping[str, Any],
    latents: jax.Array,
    timestep: jax.Array,
    context: jax.Array,
    pooled: jax.Array,
    references: jax.Array | None,
    reference_sizes: jax.Array | None,
) -> jax.Array:
    """See `Backbone.velocity`."""
    return transformer.apply(variables, latents, timestep, context, pooled, references, reference_sizes)


def _mmdit_inputs(config: MMDiTConfig) -> tuple[Any, ...]:
    latents = jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels))
    context = jnp.zeros((1, 1, config.joint_attention_dim))
    return latents, jnp.zeros(1), context, jnp.zeros((1, config.pooled_projection_dim))


def _vae_inputs(config: VAEConfig) -> tuple[Any, ...]:
    return (jnp.zeros((1, *[config.downsampling] * 2, config.in_channels)),)


def _text_inputs(config: CLIPTextConfig | T5Config) -> tuple[Any, ...]:
    del config
    return (jnp.zeros((1, 2), jnp.int32),)


def make_conditioner(
    configs: Mapping[str, Any], tokenizers: Mapping[str, Any], settings: Mapping[str, Any], options: Mapping[str, Any]
) -> TextConditioner:
    """See `Family.make_conditioner`; T5 may be absent."""
    third = configs.get("text_encoder_3")
    return TextConditioner(
        CLIPTextModelWithProjection(configs["text_encoder"], **options),
        CLIPTextModelWithProjection(configs["text_encoder_2"], **options),
        None if third is None else T5Encoder(third, **options),
        tokenizers["tokenizer"],
        tokenizers["tokenizer_2"],
        None if third is None else tokenizers["tokenizer_3"],
        joint_attention_dim=configs["transformer"].joint_attention_dim,
        **settings,
    )


def load_text_tokenizers(folder: Path, configs: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, Any]:
    """See `Family.load_tokenizers`."""
    del folders
    for name in TOKENIZERS:
        if name.replace("tokenizer", "text_encoder") in configs and not (folder / name).is_dir():
            raise FileNotFoundError(f"The model folder {folder} lacks {name}/; copy it from the original checkpoint.")
    return load_tokenizers(folder)


def model_index(networks: Collection[str]) -> dict[str, Any]:
    """diffusers' model_index.json: where each component's class lives."""
    with_t5 = "text_encoder_3" in networks
    nothing = [None, None]
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"] if with_t5 else nothing,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"] if with_t5 else nothing,
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


MMDIT = Backbone(
    MMDiTConfig,
    MMDiT,
    mmdit_names.rules,
    _mmdit_inputs,
    velocity=velocity,
    flops=forward_flops,
    lora_targets=lora.LORA_TARGETS,
    init_lora=lora.init_lora,
    never_trained=r"(^|/)pos_embed/pos_embed$",
)
NETWORKS.register(MMDiTConfig.CLASS_NAME)(MMDIT)
# The class of the authors' own code; its tensors are the same.
NETWORKS.register("SD3Transformer2DKontextModel")(MMDIT)
NETWORKS.register(VAEConfig.CLASS_NAME)(Network(VAEConfig, AutoencoderKL, vae_names.rules, _vae_inputs))
NETWORKS.register(CLIPTextConfig.CLASS_NAME)(
    Network(CLIPTextConfig, CLIPTextModelWithProjection, clip_names.rules, _text_inputs, library="transformers")
)
NETWORKS.register(T5Config.CLASS_NAME)(
    Network(T5Config, T5Encoder, t5_names.rules, _text_inputs, library="transformers")
)
FAMILIES.register("sd3")(
    Family(
        "sd3",
        {
            "transformer": MMDiTConfig.CLASS_NAME,
            "vae": VAEConfig.CLASS_NAME,
            "text_encoder": CLIPTextConfig.CLASS_NAME,
            "text_encoder_2": CLIPTextConfig.CLASS_NAME,
            "text_encoder_3": T5Config.CLASS_NAME,
        },
        TextConditioner,
        make_conditioner,
        load_text_tokenizers,
        tokenizer_folders=TOKENIZERS,
        optional=("text_encoder_3",),
        model_index=model_index,
    )
)
SIZES.register("sd35_medium")(
    ModelSizes(
        "sd3",
        {
            "transformer": MMDiTConfig(),
            "vae": VAEConfig(),
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_BIGG,
            "text_encoder_3": T5Config(),
        },
        shift=3.0,
        settings={"max_sequence_length": 256},
    )
)

PARAMETER_ROWS.register("sd3")(
    (
        # The VAE's convolutions are small beside its activations.
        (r"(^|/)vae/", ()),
        # LoRA: of the joint attention.
        (r"/to(_add)?_out/a$", ("heads", None)),
        (r"/to(_add)?_out/b$", (None, "embed")),
        (r"/attn/\w+/a$", ("embed", None)),
        (r"/attn/\w+/b$", (None, "heads")),
        # T5, which reads a step's prompts once and is larger than the transformer.
        (r"/attention/[qkv]/kernel$", ("stored", "heads")),
        (r"/wi_[01]/kernel$", ("stored", "hidden")),
        (r"/attention/o/kernel$", ("heads", "stored")),
        (r"/wo/kernel$", ("hidden", "stored")),
        (r"/shared/embedding$", ("vocabulary", "stored")),
        (r"/pos_embed/pos_embed$", (None, "embed")),  # 0.9 GB at full size, of which a step needs a corner
    )
)
