"""One attention function behind every network."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from unipic2_jax.models.splash import fits, splash
from unipic2_jax.parallel.mesh import platform
from unipic2_jax.parallel.rules import constrain, split_over

logger = logging.getLogger(__name__)

# Kernel -> the platform it needs.
KERNELS = {"xla": None, "cudnn": "gpu", "splash": "tpu"}
IMPLEMENTATIONS = ("auto", *KERNELS)
# From so many keys on, holding all logits costs more than splash attention's padding.
SPLASH_KEYS = 1024
# The widest head that cuDNN has on every GPU; a multiple of 8 in any case.
CUDNN_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of `attention` was traced for, and the kernel that it got.

    Attributes:
      network: whose attention it is; heads, width: heads and channels of one; queries, keys: tokens.
      reason: why it is not the platform's own kernel, or what was done so that it could be; None: nothing to say.
      operands: 'query', 'key', 'mask' and 'bias', described; None for what there is not. Calls that differ in nothing else
        (the batch, say) are equal.
    """

    network: str
    heads: int
    width: int
    queries: int
    keys: int
    implementation: str
    reason: str | None
    operands: Mapping[str, jax.ShapeDtypeStruct | None] = dataclasses.field(compare=False, repr=False)

    def __str__(self) -> str:
        shape = f"{self.heads} heads of {self.width}, {self.queries} x {self.keys}"
        return f"{self.network} ({shape}): {self.implementation}" + (f", {self.reason}" if self.reason else "")


_RECORD: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("attention calls", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Notes which kernel every call gets that is traced inside, each different call once."""
    calls: list[Call] = []
    token = _RECORD.set(calls)
    try:
        yield calls
    finally:
        _RECORD.reset(token)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    keys: int | None = None,
    network: str = "",
) -> jax.Array:
    """Softmax attention with the softmax in float32.

    Args:
      query: [B, Q, N, D]; key, value: [B, K, N, D].
      mask: bool, broadcastable to [B, N, Q, K]; True where a key may be seen. Every query must see at least one key.
      bias: added to the logits, broadcastable to [B, N, Q, K].
      scale: multiplies the logits; 1 / sqrt(D) by default.
      implementation: 'xla' (every backend), 'cudnn' (GPU, bf16 / fp16), 'splash' (TPU; no bias, masks [B, 1, 1, K]), or
        'auto', which takes the best that can do what is asked and logs once which that is.
      keys: so many of the keys are there, those behind them are padding that nothing sees (`filler`); None: all. Instead of a mask.
      network: whose attention this is, for the log and for `recorded`.

    Returns:
      [B, Q, N, D] in value's dtype, under the name 'attention' for remat policies.

    Raises:
      ValueError: for a kernel by name that cannot do this here; there is no silent fallback.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if keys == key.shape[1]:
        keys = None
    if keys is not None and (mask is not None or bias is not None):
        raise ValueError("attention takes `keys`, or a mask and a bias; put the padding into the mask.")
    # Each device has some of the queries and of the heads, and all keys of those.
    query = constrain(query, "batch", "sequence", "heads", None)
    key, value = (constrain(x, "batch", None, "heads", None) for x in (key, value))
    reason = None
    if implementation == "auto":
        implementation, reason = _best(query, key, mask, bias)
        _say(network, implementation, platform(), reason)
    elif refused := _refusal(implementation, query, key, mask, bias):
        raise ValueError(f"Attention by '{implementation}' cannot be had here: {refused}; use 'auto'.")
    if (calls := _RECORD.get()) is not None:
        describe = lambda x: None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
        operands = {"query": describe(query), "key": describe(key), "mask": describe(mask), "bias": describe(bias)}
        heads, width = query.shape[2:]
        call = Call(network, heads, width, query.shape[1], key.shape[1], implementation, reason, operands)
        if call not in calls:
            calls.append(call)
    if keys is not None and implementation != "cudnn":
        mask = jnp.broadcast_to(jnp.arange(key.shape[1]) < keys, (key.shape[0], 1, 1, key.shape[1]))
    if implementation == "cudnn":
        out = _cudnn(query, key, value, mask, bias, scale, keys)
    elif implementation == "splash":
        out = splash(query, key, value, None if mask is None else mask[:, 0, 0], scale)
    else:
        out = _xla(query, key, value, mask, bias, scale)
    return checkpoint_name(out, "attention")


def filler(tokens: int, dtype: jnp.dtype, implementation: str = "auto") -> int:
    """How many tokens of padding a network appends once so that no attention over all of its tokens copies them into even lengths.

    JAX lets cuDNN have even lengths alone in a gradient; an odd one costs an H200 a half to all of the attention's time again
    (docs/performance.md).
    """
    cudnn = implementation == "cudnn" or (implementation == "auto" and platform() == "gpu")
    return tokens % 2 if cudnn and dtype in (jnp.bfloat16, jnp.float16) and not split_over("sequence") else 0


def check_implementation(implementation: str) -> None:
    """Before anything is computed: whether the name is known and the platform has the kernel.

    Raises:
      ValueError: when not.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is '{implementation}'; use one of {', '.join(IMPLEMENTATIONS)}.")
    wanted = KERNELS.get(implementation)
    if wanted not in (None, platform()):
        raise ValueError(f"attention is '{implementation}', which a {platform()} has not; use 'auto'.")


def _refusal(
    implementation: str, query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: jax.Array | None
) -> str | None:
    """Why this kernel cannot do it; None: it can."""
    if implementation not in KERNELS:
        return f"there is {', '.join(IMPLEMENTATIONS)}"
    if KERNELS[implementation] not in (None, platform()):
        return f"this is a {platform()}"
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


def _best(query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> tuple[str, str | None]:
    """The kernel to take, and what there is to say about that."""
    wanted = {"gpu": "cudnn", "tpu": "splash"}.get(platform(), "xla")
    reason = _refusal(wanted, query, key, mask, bias)
    if wanted == "splash" and not reason and key.shape[1] < SPLASH_KEYS:
        reason = f"there are fewer than {SPLASH_KEYS} keys"
    if reason:
        return "xla", f"not {wanted}, since {reason}"
    if wanted == "cudnn" and (query.shape[1] % 2 or key.shape[1] % 2):
        return wanted, "padded to even lengths"
    return wanted, None


@functools.cache
def _say(network: str, implementation: str, platform: str, reason: str | None) -> None:
    of, why = (f" of {network}" if network else ""), (f" ({reason})" if reason else "")
    logger.info("attention%s on %s: %s%s", of, platform, implementation, why)


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    valid: int | None = None,
) -> jax.Array:
    """cuDNN's kernel. JAX lets it have even lengths alone in a gradient; the tokens that make them even are never seen.

    Where nothing but keys is masked the kernel is told how many keys there are, and stays the plain flash kernel: the keys that
    are seen come first, since their order does not matter. It adds every other mask, and a bias, query by query.
    """
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    rows, columns = queries % 2, keys % 2
    run = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    longer = lambda x, more: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x
    if bias is None and (mask is None or mask.shape[1:3] == (1, 1)):
        count = jnp.full((batch,), keys if valid is None else valid, jnp.int32)
        if mask is not None:
            seen = jnp.broadcast_to(mask[:, 0, 0], (batch, keys))
            order = jnp.argsort(~seen, axis=1, stable=True)[..., None, None]
            key, value = (jnp.take_along_axis(x, order, axis=1) for x in (key, value))
            # A sample that is padding as a whole sees a key of its padding.
            count = jnp.maximum(seen.sum(axis=1, dtype=jnp.int32), 1)
        if mask is None and valid is None and not rows and not columns:
            return run(query, key, value)
        lengths = {"query_seq_lengths": jnp.full((batch,), queries, jnp.int32), "key_value_seq_lengths": count}
        return run(longer(query, rows), longer(key, columns), longer(value, columns), **lengths)[:, :queries]
    if columns and mask is None:
        mask = jnp.ones((1, 1, 1, keys), bool)

    def even(x: jax.Array | None) -> jax.Array | None:
        """[B, N, Q, K] with a key more that no query sees, and a query more that sees what the last one does."""
        if x is None:
            return None
        x = jnp.pad(jnp.broadcast_to(x, (*x.shape[:2], queries, keys)), ((0, 0), (0, 0), (0, 0), (0, columns)))
        return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, 0)), mode="edge")

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
