"""MetaQuery's learnable queries and connector: a vision-language model's last states become what the MMDiT is conditioned on.

Original: `StableDiffusion3Conditioner` of UniPic 2.0 (report, section 3.1.2).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.remat import stacked
from unipic2_jax.models.sd3.clip import ACTIVATIONS, CLIPMLP, CLIPAttention
from unipic2_jax.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class ConnectorConfig(ModelConfig):
    """Sizes of the connector's encoder; `connector_config` in the conditioner's config.json."""

    CLASS_NAME = "ConnectorConfig"

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"The connector's hidden_act {self.hidden_act!r} is unknown; use one of {[*ACTIVATIONS]}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"The connector's hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads; "
                "make it a multiple of num_attention_heads."
            )


@dataclasses.dataclass(frozen=True)
class MetaQueryConfig(ModelConfig):
    """Sizes under the names of the published conditioner/config.json; the defaults are UniPic2-MetaQuery's."""

    CLASS_NAME = "StableDiffusion3Conditioner"

    num_queries: int = 256
    llm_hidden_size: int = 3584
    pooled_projection_dim: int = 2048
    joint_attention_dim: int = 4096
    connector_config: ConnectorConfig = dataclasses.field(default_factory=ConnectorConfig)

    def to_dict(self) -> dict[str, Any]:
        """As the base. The original wants to be told how to attend; 'sdpa' needs no extra package."""
        connector = {**self.connector_config.to_dict(), "_attn_implementation": "sdpa"}
        return {**super().to_dict(), "connector_config": connector}


class ConnectorLayer(nn.Module):
    """A pre-norm ViT block without mask, [B, Q, D] -> [B, Q, D]."""

    config: ConnectorConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.LayerNorm, epsilon=self.config.layer_norm_eps, **kinds)
        attend = CLIPAttention(self.config, causal=False, **kinds, name="self_attn")
        x = constrain(x, "batch", "sequence", None)
        x = x + attend(norm(name="layer_norm1")(x))
        return x + CLIPMLP(self.config, **kinds, name="mlp")(norm(name="layer_norm2")(x)), None


class MetaQuery(nn.Module):
    """The queries that a vision-language model reads behind its prompt, and the way from its states there to the MMDiT.

    Attributes:
      zero_projectors: a new model's projections onto the MMDiT are zero, so that it starts from an unconditioned one.
    """

    config: MetaQueryConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    zero_projectors: bool = True

    def setup(self) -> None:
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = (c.num_queries, c.llm_hidden_size)
        self.meta_queries = self.param(
            "meta_queries", nn.initializers.normal(c.llm_hidden_size**-0.5), shape, self.param_dtype
        )
        self.projector_1 = nn.Dense(c.connector_config.hidden_size, **kinds)
        layers = stacked(ConnectorLayer, self.remat, c.connector_config.num_hidden_layers)
        self.layers = layers(c.connector_config, **kinds)
        start = {"kernel_init": nn.initializers.zeros} if self.zero_projectors else {}
        self.projector_2 = nn.Dense(c.pooled_projection_dim, **kinds, **start)
        self.projector_3 = nn.Dense(c.joint_attention_dim, **kinds, **start)

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The vision-language model's last states at the queries [B, Q, llm_hidden_size] to context [B, Q, J], pooled [B, P]."""
        x, _ = self.layers(self.projector_1(hidden))
        return self.projector_3(x), self.projector_2(x.mean(axis=1))

    def queries(self, batch: int) -> jax.Array:
        """The queries as input embeddings [B, Q, llm_hidden_size]."""
        shape = (batch, self.config.num_queries, self.config.llm_hidden_size)
        return jnp.broadcast_to(self.meta_queries.astype(self.dtype), shape)
