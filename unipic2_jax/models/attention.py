"""One attention function behind every network."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unipic2_jax.models.splash import fits, splash
from unipic2_jax.parallel.rules import constrain, split_over

logger = logging.getLogger(__name__)

# Kernel -> the platform it needs.
KERNELS = {"xla": None, "cudnn": "gpu", "splash": "tpu"}
IMPLEMENTATIONS = ("auto", *KERNELS)
# From so many keys on, holding all logits costs more than splash attention's padding.
SPLASH_KEYS = 1024
# The widest head that cuDNN has on every GPU; a multiple of 8 in any case.
CUDNN_WIDTH = 128


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention with the softmax in float32.

    Args:
      query: [B, Q, N, D]; key, value: [B, K, N, D].
      mask: bool, broadcastable to [B, N, Q, K]; True where a key may be seen. Every query must see at least one key.
      bias: added to the logits, broadcastable to [B, N, Q, K].
      scale: multiplies the logits; 1 / sqrt(D) by default.
      implementation: 'xla' (every backend), 'cudnn' (GPU, bf16 / fp16), 'splash' (TPU; no bias, masks [B, 1, 1, K]), or
        'auto', which takes the best that can do what is asked and logs once which that is.

    Returns:
      [B, Q, N, D] in value's dtype, under the name 'attention' for remat policies.

    Raises:
      ValueError: for a kernel by name that cannot do this here; there is no silent fallback.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Each device has some of the queries and of the heads, and all keys of those.
    query = constrain(query, "batch", "sequence", "heads", None)
    key, value = (constrain(x, "batch", None, "heads", None) for x in (key, value))
    if implementation == "auto":
        implementation = _best(query, key, mask, bias)
    elif refused := _refusal(implementation, query, key, mask, bias):
        raise ValueError(f"Attention by '{implementation}' cannot be had here: {refused}; use 'auto'.")
    if implementation == "cudnn":
        out = _cudnn(query, key, value, mask, bias, scale)
    elif implementation == "splash":
        out = splash(query, key, value, None if mask is None else mask[:, 0, 0], scale)
    else:
        out = _xla(query, key, value, mask, bias, scale)
    return checkpoint_name(out, "attention")


def check_implementation(implementation: str) -> None:
    """Before anything is computed: whether the name is known and the platform has the kernel.

    Raises:
      ValueError: when not.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is '{implementation}'; use one of {', '.join(IMPLEMENTATIONS)}.")
    wanted = KERNELS.get(implementation)
    if wanted not in (None, _platform()):
        raise ValueError(f"attention is '{implementation}', which a {_platform()} has not; use 'auto'.")


def _platform() -> str:
    """What programs traced here will run on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _refusal(
    implementation: str, query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: jax.Array | None
) -> str | None:
    """Why this kernel cannot do it; None: it can."""
    if implementation not in KERNELS:
        return f"there is {', '.join(IMPLEMENTATIONS)}"
    if KERNELS[implementation] not in (None, _platform()):
        return f"this is a {_platform()}"
    if implementation == "cudnn":
        width = query.shape[-1]
        if query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it computes in 16 bits, not in {query.dtype}"
        if width > CUDNN_WIDTH or width % 8:
            return f"its heads have at most {CUDNN_WIDTH} channels, a multiple of 8, not {width}"
        if split_over("sequence"):
            return "the queries of a sample are split over devices"
    if implementation == "splash":
        if bias is not None:
            return "there is a bias"
        if mask is not None and mask.shape != (key.shape[0], 1, 1, key.shape[1]):
            return "the mask says more than which keys are there"
        if not fits(query, key):
            return "the devices do not divide the samples, heads or queries"
    return None


def _best(query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> str:
    wanted = {"gpu": "cudnn", "tpu": "splash"}.get(_platform(), "xla")
    reason = _refusal(wanted, query, key, mask, bias)
    if wanted == "splash" and key.shape[1] < SPLASH_KEYS:
        reason = f"there are fewer than {SPLASH_KEYS} keys"
    _say("xla" if reason else wanted, _platform(), reason and f"not {wanted}, since {reason}")
    return "xla" if reason else wanted


@functools.cache
def _say(implementation: str, platform: str, reason: str | None) -> None:
    logger.info("attention on %s: %s%s", platform, implementation, f" ({reason})" if reason else "")


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """cuDNN's kernel. It adds masks and biases query by query, and has a backward pass for even lengths of these only."""
    queries, keys = query.shape[1], key.shape[1]
    run = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    if mask is None and bias is None:
        return run(query, key, value)
    rows, columns = queries % 2, keys % 2
    if columns and mask is None:
        mask = jnp.ones((1, 1, 1, keys), bool)
    if rows or columns:
        _say("cudnn", "gpu", "odd lengths under a mask or bias are padded to even ones")

    def even(x: jax.Array | None) -> jax.Array | None:
        """[B, N, Q, K] with a key more that no query sees, and a query more that sees what the last one does."""
        if x is None:
            return None
        x = jnp.pad(jnp.broadcast_to(x, (*x.shape[:2], queries, keys)), ((0, 0), (0, 0), (0, 0), (0, columns)))
        return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, 0)), mode="edge")

    longer = lambda x, more: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
    out = run(longer(query, rows), longer(key, columns), longer(value, columns), even(bias), even(mask))
    return out[:, :queries]


def _xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
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
