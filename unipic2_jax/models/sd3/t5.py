"""T5 v1.1's encoder. Original: `transformers.T5EncoderModel`."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unipic2_jax.models.attention import attention
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.remat import stacked


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
    """Sizes of a T5 v1.1 encoder; field names and meanings are those of transformers. The defaults are T5-XXL."""

    CLASS_NAME = "T5EncoderModel"
    MODEL_TYPE = "t5"

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    pad_token_id: int = 0
    eos_token_id: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(
                f"T5 feed_forward_proj {self.feed_forward_proj!r} is not supported; use T5 v1.1 ('gated-gelu')."
            )


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 [S, S].

    Half of the buckets serve keys after the query. In either half, one half is exact distances and the rest grows
    logarithmically up to `max_distance` (mesh-tensorflow's `_relative_position_bucket`, bidirectional).
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # float32 as in the original: powers of two sit exactly on bucket borders, where the rounding decides.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


class T5Attention(nn.Module):
    """Self-attention without scaling, [B, S, D] -> [B, S, D]."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        c = self.config
        inner = c.num_heads * c.d_kv

        def dense(features: int, std: float, name: str) -> nn.Dense:
            kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.normal(std), **kinds, name=name)

        # T5 folds 1 / sqrt(d_kv) into the initial scale of the query instead of into the logits.
        stds = {"q": (c.d_model * c.d_kv) ** -0.5, "k": c.d_model**-0.5, "v": c.d_model**-0.5}
        query, key, value = (
            dense(inner, std, name)(x).reshape(*x.shape[:2], c.num_heads, c.d_kv) for name, std in stds.items()
        )
        mixed = attention(query, key, value, mask=mask, bias=bias, scale=1.0, network="T5")
        return dense(c.d_model, inner**-0.5, "o")(mixed.reshape(*x.shape[:2], inner))


class T5MLP(nn.Module):
    """Gated feed-forward with tanh-GELU, [B, S, D] -> [B, S, D]."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
        init_in, init_out = (nn.initializers.normal(width**-0.5) for width in (c.d_model, c.d_ff))
        gate = jax.nn.gelu(dense(c.d_ff, kernel_init=init_in, name="wi_0")(x), approximate=True)
        return dense(c.d_model, kernel_init=init_out, name="wo")(
            gate * dense(c.d_ff, kernel_init=init_in, name="wi_1")(x)
        )


class T5Layer(nn.Module):
    """A pre-norm block; the position bias and the mask are shared by all layers."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.RMSNorm, epsilon=self.config.layer_norm_epsilon, **kinds)
        attend = T5Attention(self.config, **kinds, name="attention")
        x = x + attend(norm(name="attention_norm")(x), bias, mask)
        x = x + T5MLP(self.config, **kinds, name="mlp")(norm(name="mlp_norm")(x))
        return x, None


class T5Encoder(nn.Module):
    """Token ids to states. Parameters of the layers are stacked along their leading axis."""

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Encodes int [B, S] ids into float [B, S, D].

        Args:
          input_ids: int [B, S].
          attention_mask: bool or int [B, S], nonzero where a token may be seen; None (as SD3 does) sees padding too.
        """
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(c.vocab_size, c.d_model, embedding_init=nn.initializers.normal(1.0), **kinds, name="shared")(
            input_ids
        )
        buckets = relative_position_buckets(
            input_ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        table = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nn.initializers.normal(c.d_model**-0.5),
            **kinds,
            name="relative_attention_bias",
        )
        bias = table(buckets).transpose(2, 0, 1)[None]
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        layers = stacked(T5Layer, "none", c.num_layers, in_axes=(nn.broadcast, nn.broadcast))
        x, _ = layers(c, **kinds, name="layers")(x, bias, mask)
        return nn.RMSNorm(epsilon=c.layer_norm_epsilon, **kinds, name="final_layer_norm")(x)
