"""CLIP's text encoder with its projection, as SD3 uses it: penultimate states and one pooled vector.

Original: `transformers.CLIPTextModelWithProjection`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipic2_jax.models.attention import attention
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.remat import stacked

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# Configs older than transformers 4.31 name 2 as the end-of-text id whatever the vocabulary is; the largest id is meant.
LEGACY_EOS_TOKEN_ID = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """Sizes of a CLIP text encoder; field names and meanings are those of transformers. The defaults are CLIP-L."""

    CLASS_NAME = "CLIPTextModelWithProjection"
    MODEL_TYPE = "clip_text_model"

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = LEGACY_EOS_TOKEN_ID

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIP hidden_act {self.hidden_act!r} is unknown; choose one of {sorted(ACTIVATIONS)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIP hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads; "
                "make it a multiple of num_attention_heads."
            )


CLIP_L = CLIPTextConfig()
CLIP_BIGG = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
)


class CLIPAttention(nn.Module):
    """Self-attention, [B, S, D] -> [B, S, D].

    `config` is CLIP's or another that has its names (MetaQuery's connector); `causal` hides what comes later.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.Dense, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        project = functools.partial(dense, kernel_init=nn.initializers.normal((2 * c.hidden_size) ** -0.5))
        query, key, value = (
            project(name=name)(x).reshape(*x.shape[:2], c.num_attention_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None] if self.causal else None
        network = "CLIP" if self.causal else "connector"
        mixed = attention(query, key, value, mask=mask, network=network).reshape(x.shape)
        out_std = (2 * c.num_hidden_layers * c.hidden_size) ** -0.5  # every residual branch starts small
        return dense(kernel_init=nn.initializers.normal(out_std), name="out_proj")(mixed)


class CLIPMLP(nn.Module):
    """Two dense layers, [B, S, D] -> [B, S, D]. `config` as in `CLIPAttention`."""

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        init_in = nn.initializers.normal((2 * c.hidden_size) ** -0.5)
        init_out = nn.initializers.normal((2 * c.num_hidden_layers * c.hidden_size) ** -0.5)
        x = dense(c.intermediate_size, kernel_init=init_in, name="fc1")(x)
        return dense(c.hidden_size, kernel_init=init_out, name="fc2")(ACTIVATIONS[c.hidden_act](x))


class CLIPLayer(nn.Module):
    """A pre-norm block that also hands on its input, so that the scan ends with the last two states."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.LayerNorm, epsilon=self.config.layer_norm_eps, **kinds)
        before, _ = carry
        x = before + CLIPAttention(self.config, **kinds, name="self_attn")(norm(name="layer_norm1")(before))
        x = x + CLIPMLP(self.config, **kinds, name="mlp")(norm(name="layer_norm2")(x))
        return (x, before), None


class CLIPTextModelWithProjection(nn.Module):
    """Token ids to (penultimate states, projected pooled vector).

    The penultimate states are the input of the last layer, before any final norm (`hidden_states[-2]` of the original);
    the pooled vector is the final norm of the last state at the end-of-text token, times `text_projection`.
    Parameters of the layers are stacked along their leading axis.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes int [B, S] ids, S <= max_position_embeddings, into float [B, S, D] and [B, P].

        Raises:
          ValueError: when the sequence is longer than the position table.
        """
        c = self.config
        length = input_ids.shape[1]
        if length > c.max_position_embeddings:
            raise ValueError(
                f"CLIP got {length} tokens but has {c.max_position_embeddings} positions; truncate the prompt."
            )
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=nn.initializers.normal(c.hidden_size**-0.5), **kinds
        )
        x = embed(c.vocab_size, name="token_embedding")(input_ids)
        x = x + embed(c.max_position_embeddings, name="position_embedding")(jnp.arange(length))[None]
        layers = stacked(CLIPLayer, "none", c.num_hidden_layers)
        (last, penultimate), _ = layers(c, **kinds, name="layers")((x, x))
        last = nn.LayerNorm(epsilon=c.layer_norm_eps, **kinds, name="final_layer_norm")(last)
        pooled = jnp.take_along_axis(last, end_of_text_index(input_ids, c.eos_token_id)[:, None, None], axis=1)[:, 0]
        project = nn.Dense(
            c.projection_dim,
            use_bias=False,
            kernel_init=nn.initializers.normal(c.hidden_size**-0.5),
            **kinds,
            name="text_projection",
        )
        return penultimate, project(pooled)


def end_of_text_index(input_ids: jax.Array, eos_token_id: int) -> jax.Array:
    """Where each row of int [B, S] ends, int [B]: the first `eos_token_id`, or the largest id in the legacy case."""
    if eos_token_id == LEGACY_EOS_TOKEN_ID:
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == eos_token_id, axis=-1)
