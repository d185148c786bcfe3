"""DeepGen's size in the shapes world: UniPic2-Tiny-MetaQuery's vision-language model and UniPic2-Tiny's transformer."""

from __future__ import annotations

import dataclasses

from unipic2_jax.models.deepgen.network import DecoderLoRAConfig, DeepGenConfig
from unipic2_jax.models.registry import SIZES
from unipic2_jax.shapes.sizes import TINY_METAQUERY

_CONNECTOR = TINY_METAQUERY.networks["conditioner"]
_VLM = TINY_METAQUERY.networks["vlm"]

TINY_DEEPGEN = dataclasses.replace(
    TINY_METAQUERY,
    family="deepgen",
    networks={
        **TINY_METAQUERY.networks,
        "conditioner": DeepGenConfig(
            _CONNECTOR.num_queries,
            _CONNECTOR.llm_hidden_size,
            _CONNECTOR.pooled_projection_dim,
            _CONNECTOR.joint_attention_dim,
            _CONNECTOR.connector_config,
            # Every second from the last but one, of five layers.
            fused_layers=(4, 2),
        ),
        "lora": DecoderLoRAConfig.of(_VLM, r=8, lora_alpha=16.0),
    },
)
SIZES.register("tiny_deepgen")(TINY_DEEPGEN)
