"""The layers of the MMDiT: dense with an optional low-rank update, norms, joint attention, the transformer block."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from unipic2_jax.models.attention import attention
from unipic2_jax.models.lora import LoRADense
from unipic2_jax.parallel.rules import constrain

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: shared by all submodules."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attention_implementation: str = "auto"


def dense(features: int, compute: Compute, *, name: str, **options: Any) -> LoRADense:
    """A dense layer of the module that this is called in."""
    return LoRADense(features, dtype=compute.dtype, param_dtype=compute.param_dtype, name=name, **options)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without learned scale or shift, in float32; keeps x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - x32.mean(axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)).astype(x.dtype)


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """x [B, S, D], scale and shift [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class RMSNorm(nn.Module):
    """Over the last axis, in float32, with a learned scale."""

    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.compute.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS)
        return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


class Modulation(nn.Module):
    """AdaLN: silu(emb) [B, D] -> `count` vectors [B, D]. Zero-initialised, so that a new block is the identity."""

    count: int
    compute: Compute

    @nn.compact
    def __call__(self, emb: jax.Array) -> list[jax.Array]:
        linear = dense(self.count * emb.shape[-1], self.compute, kernel_init=nn.initializers.zeros, name="linear")
        vectors = jnp.split(linear(nn.silu(emb)), self.count, axis=-1)
        return [constrain(vector, "batch", None) for vector in vectors]


class FeedForward(nn.Module):
    """[..., D] -> 4 D -> [..., D] with tanh-GELU."""

    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(dense(4 * x.shape[-1], self.compute, name="linear_1")(x), approximate=True)
        return dense(x.shape[-1], self.compute, name="linear_2")(hidden)


class Attention(nn.Module):
    """Self-attention of the image stream, joined with the text stream when `context` is given."""

    heads: int
    qk_norm: bool
    compute: Compute
    context_out: bool = True  # False: the text stream ends here, and only its keys and values matter.
    skip: int = 0  # This many leading image tokens need no output.
    padding: int = 0  # Last text tokens that nothing sees, see `attention.filler`.

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, S, D], context [B, T, D], mask bool [B, 1, 1, S + T] or wider -> ([B, S - skip, D], [B, T, D])."""
        width = x.shape[-1]

        def project(name: str, tokens: jax.Array, norm: str | None) -> jax.Array:
            y = dense(width, self.compute, name=name)(tokens)
            y = rearrange(y, "b s (n d) -> b s n d", n=self.heads)
            return RMSNorm(self.compute, name=norm)(y) if norm and self.qk_norm else y

        query = project("to_q", x[:, self.skip :], "norm_q")
        key, value = project("to_k", x, "norm_k"), project("to_v", x, None)
        length = query.shape[1]
        if context is not None:
            added = project("add_q_proj", context, "norm_added_q")
            if self.context_out:
                query = jnp.concatenate([query, added], axis=1)
            key = jnp.concatenate([key, project("add_k_proj", context, "norm_added_k")], axis=1)
            value = jnp.concatenate([value, project("add_v_proj", context, None)], axis=1)
        keys: int | None = key.shape[1] - (0 if context is None else self.padding)
        if mask is not None:
            mask, keys = mask[..., : key.shape[1]], None
        kernel = self.compute.attention_implementation
        out = attention(query, key, value, mask=mask, implementation=kernel, keys=keys, network="MMDiT")
        out = rearrange(out, "b s n d -> b s (n d)")
        image = dense(width, self.compute, name="to_out")(out[:, :length])
        if context is None or not self.context_out:
            return image, None
        return image, dense(width, self.compute, name="to_add_out")(out[:, length:])


class Block(nn.Module):
    """A joint transformer block, diffusers' `JointTransformerBlock`.

    `dual` adds a second attention over image tokens alone. `last` ends the text stream and drops the `skip` leading
    image tokens: nothing behind the last block looks at references. The last `padding` text tokens are seen by none.
    """

    heads: int
    qk_norm: bool
    compute: Compute
    dual: bool = False
    last: bool = False
    skip: int = 0
    padding: int = 0

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array], emb: jax.Array, mask: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """streams: image [B, S, D] and context [B, T, D]; emb [B, D]; mask bool [B, 1, 1, S + T] over keys, or None."""
        x, context = streams
        x, context = constrain(x, "batch", "sequence", None), constrain(context, "batch", None, None)
        compute = self.compute
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = Modulation(
            9 if self.dual else 6, compute, name="norm1"
        )(emb)
        if self.last:
            # diffusers' AdaLayerNormContinuous: scale comes first here.
            context_scale, context_shift = Modulation(2, compute, name="norm1_context")(emb)
        else:
            context_shift, context_scale, context_gate, *context_mlp = Modulation(6, compute, name="norm1_context")(emb)

        normed = layer_norm(x)
        attended, context_attended = Attention(
            self.heads, self.qk_norm, compute, not self.last, self.skip, self.padding, name="attn"
        )(modulate(normed, scale, shift), modulate(layer_norm(context), context_scale, context_shift), mask)
        x = x[:, self.skip :] + gate[:, None] * attended
        if self.dual:
            shift2, scale2, gate2 = second
            attended, _ = Attention(self.heads, self.qk_norm, compute, skip=self.skip, name="attn2")(
                modulate(normed, scale2, shift2), None, mask
            )
            x = x + gate2[:, None] * attended
        forwarded = FeedForward(compute, name="ff")(modulate(layer_norm(x), scale_mlp, shift_mlp))
        x = x + gate_mlp[:, None] * forwarded
        if not self.last:
            shift_mlp, scale_mlp, gate_mlp = context_mlp
            context = context + context_gate[:, None] * context_attended
            forwarded = FeedForward(compute, name="ff_context")(modulate(layer_norm(context), scale_mlp, shift_mlp))
            context = context + gate_mlp[:, None] * forwarded
        return (x, context), None


class TwoLayer(nn.Module):
    """Linear, SiLU, linear."""

    features: int
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.silu(dense(self.features, self.compute, name="linear_1")(x))
        return dense(self.features, self.compute, name="linear_2")(hidden)
