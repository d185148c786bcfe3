"""DeepGen 1.0: Qwen2.5-VL-3B with or without a LoRA, queries, a connector over six layers, SD3.5's transformer and VAE.

Original: deepgenteam/deepgen, `configs/models/deepgen_scb.py`. Its transformer starts from UniPic2-SD3.5M-Kontext.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from unipic2_jax.models.deepgen import names
from unipic2_jax.models.deepgen.conditioner import DeepGenConditioner
from unipic2_jax.models.deepgen.file import FORMAT
from unipic2_jax.models.deepgen.network import DecoderLoRA, DecoderLoRAConfig, DeepGenConfig
from unipic2_jax.models.family import Family, ModelSizes, Network
from unipic2_jax.models.metaquery.connector import MetaQuery
from unipic2_jax.models.qwen.decoder import QWEN2_5_VL_3B, Qwen2_5_VL, Qwen2_5_VLConfig
from unipic2_jax.models.qwen.processor import VLMProcessor
from unipic2_jax.models.registry import FAMILIES, NETWORKS, SIZES, class_name
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.models.sd3.vae import VAEConfig


def _states(config: DeepGenConfig) -> tuple[Any, ...]:
    return (jnp.zeros((1, 1, config.read_size)),)


def _nothing(config: DecoderLoRAConfig) -> tuple[Any, ...]:
    del config
    return ()


def make_conditioner(
    configs: Mapping[str, Any], processor: VLMProcessor, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> DeepGenConditioner:
    """See `Family.make_conditioner`; the LoRA may be absent."""
    lora = DecoderLoRA(configs["lora"], **options) if "lora" in configs else None
    connector = MetaQuery(configs["conditioner"], **options)
    return DeepGenConditioner(Qwen2_5_VL(configs["vlm"], **options), connector, processor, lora=lora, **settings)


def load_processor(folder: Path | None, configs: Mapping[str, Any], folders: Mapping[str, Path]) -> VLMProcessor:
    """See `Family.load_tokenizers`: the vision-language model's folder holds them."""
    if folder is None:  # a model that is put together has it among its parts
        return VLMProcessor.load(folders["vlm"], configs["vlm"])
    return VLMProcessor.load(folders.get("vlm", folder / "vlm"), configs["vlm"])


def recognises(folder: Path) -> bool:
    """A folder whose `conditioner/` says that it is DeepGen's."""
    config = folder / "conditioner" / "config.json"
    return config.is_file() and class_name(config.parent) == DeepGenConfig.CLASS_NAME


def model_index(networks: Collection[str]) -> dict[str, Any]:
    """model_index.json: which networks there are. The class is the one that the authors ship with their weights."""
    libraries = {"vlm": "transformers", "conditioner": "unipic2_jax", "lora": "unipic2_jax"}
    there = lambda name, kind: [libraries.get(name, "diffusers"), kind] if name in networks else [None, None]
    index = {name: there(name, kind) for name, kind in DEEPGEN.networks.items()}
    return {"_class_name": "DeepGenPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], **index}


DEEPGEN = Family(
    "deepgen",
    {
        "transformer": MMDiTConfig.CLASS_NAME,
        "vae": VAEConfig.CLASS_NAME,
        "conditioner": DeepGenConfig.CLASS_NAME,
        "vlm": Qwen2_5_VLConfig.CLASS_NAME,
        "lora": DecoderLoRAConfig.CLASS_NAME,
    },
    DeepGenConditioner,
    make_conditioner,
    load_processor,
    reader="vlm",
    recognises=recognises,
    optional=("lora",),
    model_index=model_index,
    file=FORMAT,
)

NETWORKS.register(DeepGenConfig.CLASS_NAME)(Network(DeepGenConfig, MetaQuery, names.rules, _states))
NETWORKS.register(DecoderLoRAConfig.CLASS_NAME)(Network(DecoderLoRAConfig, DecoderLoRA, names.lora_rules, _nothing))
FAMILIES.register("deepgen")(DEEPGEN)
SIZES.register("deepgen")(
    ModelSizes(
        "deepgen",
        {
            "transformer": MMDiTConfig(),
            "vae": VAEConfig(),
            "conditioner": DeepGenConfig(),
            "vlm": QWEN2_5_VL_3B,
            "lora": DecoderLoRAConfig(),
        },
        shift=3.0,
    )
)
