"""Which network a folder holds, by the class name that diffusers and transformers write into its `config.json`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.core.fields import check_fields
from unipic2_jax.core.strict import read_object as read_json
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.metaquery import names as connector
from unipic2_jax.models.metaquery.connector import MetaQuery, MetaQueryConfig
from unipic2_jax.models.qwen import names as qwen
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL, Qwen2_5_VLConfig, example_inputs
from unipic2_jax.models.sd3 import clip_names as clip
from unipic2_jax.models.sd3 import mmdit_names as mmdit
from unipic2_jax.models.sd3 import t5_names as t5
from unipic2_jax.models.sd3 import vae_names as vae
from unipic2_jax.models.sd3.clip import CLIPTextConfig, CLIPTextModelWithProjection
from unipic2_jax.models.sd3.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.models.sd3.t5 import T5Config, T5Encoder
from unipic2_jax.models.sd3.vae import AutoencoderKL, VAEConfig
from unipic2_jax.weights.table import Rule


@dataclasses.dataclass(frozen=True)
class Network:
    """One kind of network.

    Attributes:
      config: its config dataclass.
      rules: config -> name table.
      init: (config, key) -> parameters.
    """

    config: type[ModelConfig]
    rules: Callable[[Any], tuple[Rule, ...]]
    init: Callable[[Any, jax.Array], dict[str, Any]]

    def abstract(self, config: ModelConfig) -> dict[str, Any]:
        """Shapes of the parameters; allocates nothing."""
        return jax.eval_shape(lambda key: self.init(config, key), jax.random.key(0))


def _init_mmdit(config: MMDiTConfig, key: jax.Array) -> dict[str, Any]:
    latents = jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels))
    context = jnp.zeros((1, 1, config.joint_attention_dim))
    pooled = jnp.zeros((1, config.pooled_projection_dim))
    return MMDiT(config).init(key, latents, jnp.zeros(1), context, pooled)["params"]


def _init_vae(config: VAEConfig, key: jax.Array) -> dict[str, Any]:
    return AutoencoderKL(config).init(key, jnp.zeros((1, *[config.downsampling] * 2, config.in_channels)))["params"]


def _init_clip(config: CLIPTextConfig, key: jax.Array) -> dict[str, Any]:
    return CLIPTextModelWithProjection(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def _init_t5(config: T5Config, key: jax.Array) -> dict[str, Any]:
    return T5Encoder(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def _init_qwen(config: Qwen2_5_VLConfig, key: jax.Array) -> dict[str, Any]:
    return Qwen2_5_VL(config).init(key, *example_inputs(config))["params"]


def _init_metaquery(config: MetaQueryConfig, key: jax.Array) -> dict[str, Any]:
    return MetaQuery(config).init(key, jnp.zeros((1, config.num_queries, config.llm_hidden_size)))["params"]


NETWORKS = {
    network.config.CLASS_NAME: network
    for network in (
        Network(MMDiTConfig, mmdit.rules, _init_mmdit),
        Network(VAEConfig, vae.rules, _init_vae),
        Network(CLIPTextConfig, clip.rules, _init_clip),
        Network(T5Config, t5.rules, _init_t5),
        Network(Qwen2_5_VLConfig, qwen.rules, _init_qwen),
        Network(MetaQueryConfig, connector.rules, _init_metaquery),
    )
}

# The class of the authors' own code; its tensors are the same.
NETWORKS["SD3Transformer2DKontextModel"] = NETWORKS[MMDiTConfig.CLASS_NAME]


def class_name(folder: str | os.PathLike) -> str:
    """The class of the network in a folder, as its config.json states it ('' where it states none)."""
    file = Path(folder) / "config.json"
    values = read_json(file)
    try:
        check_fields({"_class_name": str | None, "architectures": tuple[str, ...] | None}, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return values.get("_class_name") or next(iter(values.get("architectures") or [""]))


def read_network(folder: str | os.PathLike) -> tuple[Network, ModelConfig]:
    """The network that a component's folder describes, with its sizes.

    Raises FileNotFoundError without a config.json, ValueError for a network that this project does not have, and for what
    `ModelConfig.read` refuses.
    """
    name = class_name(folder)
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(
            f"{Path(folder) / 'config.json'} describes a network of class {name!r}{hint}, which is not known here; "
            f"known are {', '.join(NETWORKS)}."
        )
    network = NETWORKS[name]
    return network, network.config.read(folder)
