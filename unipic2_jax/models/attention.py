"""One attention function behind every network."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unipic2_jax.parallel.rules import constrain

IMPLEMENTATIONS = ("xla", "cudnn")


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention with the softmax in float32.

    Args:
      query: [B, Q, N, D]; key, value: [B, K, N, D].
      mask: bool, broadcastable to [B, N, Q, K]; True where a key may be seen. Every query must see at least one key.
      bias: added to the logits, broadcastable to [B, N, Q, K].
      scale: multiplies the logits; 1 / sqrt(D) by default.
      implementation: 'xla' (every backend) or 'cudnn' (GPU, bf16 / fp16). There is no silent fallback.

    Returns:
      [B, Q, N, D] in value's dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Each device has some of the queries and of the heads, and all keys of those.
    query = constrain(query, "batch", "sequence", "heads", None)
    key, value = (constrain(x, "batch", None, "heads", None) for x in (key, value))
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation="cudnn")
    if implementation != "xla":
        raise ValueError(f"Attention implementation {implementation!r} is unknown; choose one of {IMPLEMENTATIONS}.")
    # Batch axes lead in both products: XLA's CPU backend is 1.6 to 1.9 times as fast that way, and compiles sooner.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    logits = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    # Normalising after the product with V touches Q*D numbers instead of Q*K: faster on CPU, the same everywhere else.
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bnqk,bnkd->bnqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return jnp.swapaxes(out / total, 1, 2).astype(value.dtype)
