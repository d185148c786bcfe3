"""UniPic2-MetaQuery: SD3.5's transformer and VAE behind a Qwen2.5-VL, queries and a connector (paper section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from unipic2_jax.models.family import Family, ModelSizes, Network
from unipic2_jax.models.metaquery import names
from unipic2_jax.models.metaquery.conditioner import MetaQueryConditioner
from unipic2_jax.models.metaquery.connector import MetaQuery, MetaQueryConfig
from unipic2_jax.models.qwen.decoder import QWEN2_5_VL_3B, QWEN2_5_VL_7B, Qwen2_5_VL, Qwen2_5_VLConfig
from unipic2_jax.models.qwen.processor import VLMProcessor
from unipic2_jax.models.registry import FAMILIES, NETWORKS, SIZES, class_name
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.models.sd3.vae import VAEConfig


def _inputs(config: MetaQueryConfig) -> tuple[Any, ...]:
    return (jnp.zeros((1, config.num_queries, config.llm_hidden_size)),)


def make_conditioner(
    configs: Mapping[str, Any], processor: VLMProcessor, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> MetaQueryConditioner:
    """See `Family.make_conditioner`."""
    vlm = Qwen2_5_VL(configs["vlm"], **options)
    return MetaQueryConditioner(vlm, MetaQuery(configs["conditioner"], **options), processor, **settings)


def load_processor(folder: Path | None, configs: Mapping[str, Any], folders: Mapping[str, Path]) -> VLMProcessor:
    """See `Family.load_tokenizers`: the vision-language model's folder holds them."""
    if folder is None:  # a model that is put together has it among its parts
        return VLMProcessor.load(folders["vlm"], configs["vlm"])
    return VLMProcessor.load(folders.get("vlm", folder / "vlm"), configs["vlm"])


def recognises(folder: Path) -> bool:
    """A folder whose `conditioner/` is ours, or does not say whose it is."""
    config = folder / "conditioner" / "config.json"
    return config.parent.is_dir() and (
        not config.is_file() or class_name(config.parent) in ("", MetaQueryConfig.CLASS_NAME)
    )


NETWORKS.register(MetaQueryConfig.CLASS_NAME)(Network(MetaQueryConfig, MetaQuery, names.rules, _inputs))
FAMILIES.register("metaquery")(
    Family(
        "metaquery",
        {
            "transformer": MMDiTConfig.CLASS_NAME,
            "vae": VAEConfig.CLASS_NAME,
            "conditioner": MetaQueryConfig.CLASS_NAME,
            "vlm": Qwen2_5_VLConfig.CLASS_NAME,
        },
        MetaQueryConditioner,
        make_conditioner,
        load_processor,
        reader="vlm",
        recognises=recognises,
    )
)

# UniPic2-MetaQuery, and the same on the smaller vision-language model.
SIZES.register("unipic2_metaquery")(
    ModelSizes(
        "metaquery",
        {"transformer": MMDiTConfig(), "vae": VAEConfig(), "conditioner": MetaQueryConfig(), "vlm": QWEN2_5_VL_7B},
        shift=3.0,
    )
)
SIZES.register("unipic2_metaquery_3b")(
    ModelSizes(
        "metaquery",
        {
            "transformer": MMDiTConfig(),
            "vae": VAEConfig(),
            "conditioner": MetaQueryConfig(llm_hidden_size=2048),
            "vlm": QWEN2_5_VL_3B,
        },
        shift=3.0,
    )
)
