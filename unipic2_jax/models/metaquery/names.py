"""The table of MetaQuery's queries and connector (UniPic 2.0's `StableDiffusion3Conditioner`)."""

from __future__ import annotations

from unipic2_jax.models.metaquery.connector import MetaQueryConfig
from unipic2_jax.models.sd3.clip_names import encoder_layers
from unipic2_jax.weights.table import Rule


def rules(config: MetaQueryConfig) -> tuple[Rule, ...]:
    """Every tensor of the folder `conditioner/`; layers are stacked."""
    out = [Rule("meta_queries", "meta_queries")]
    for name in ("projector_1", "projector_2", "projector_3"):
        out += [Rule(f"{name}.weight", f"{name}/kernel", "linear"), Rule(f"{name}.bias", f"{name}/bias")]
    return (*out, *encoder_layers("connector.layers.{i}", range(config.connector_config.num_hidden_layers)))
