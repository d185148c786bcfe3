"""Splash attention on TPU: JAX's own kernel, which never holds the logits, for each device's samples, heads and queries."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from unipic2_jax.parallel.compat import current_mesh, shard_map, splash_attention
from unipic2_jax.parallel.rules import RULES, devices_along

BLOCK = 512  # queries, and keys, that the kernel has on chip at a time; a multiple of its lanes
LANES = 128


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Whether the mesh in use divides samples, heads and queries evenly, as a kernel for each device needs."""
    mesh = current_mesh()
    if mesh.empty or mesh.size == 1:
        return True
    specs = ((query.shape, _query_spec()), (key.shape, _key_spec()))
    return all(not n % devices_along(mesh, names) for shape, spec in specs for n, names in zip(shape, spec))


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array | None, scale: float, interpret: bool = False
) -> jax.Array:
    """Attention as in `models.attention`.

    Args:
      query: [B, Q, N, D]; key, value: [B, K, N, D].
      seen: bool [B, K], the keys that may be seen, at least one; None: all.
      interpret: in plain JAX on any machine, to test with.
    """
    seen = jnp.ones(key.shape[:2], bool) if seen is None else seen
    run = functools.partial(_on_one_device, scale=scale, interpret=interpret)
    mesh = current_mesh()
    if mesh.empty or mesh.size == 1:
        return run(query, key, value, seen)
    given = (_query_spec(), _key_spec(), _key_spec(), RULES.spec("batch", None))
    return shard_map(run, in_specs=given, out_specs=_query_spec(), check_vma=False)(query, key, value, seen)


def _query_spec() -> jax.sharding.PartitionSpec:
    return RULES.spec("batch", "sequence", "heads", None)


def _key_spec() -> jax.sharding.PartitionSpec:
    return RULES.spec("batch", None, "heads", None)


def _block(length: int) -> int:
    return min(BLOCK, -(-length // LANES) * LANES)


def _on_one_device(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, scale: float, interpret: bool
) -> jax.Array:
    queries, heads = query.shape[1:3]
    rows, columns = _block(queries), _block(key.shape[1])

    def padded(x: jax.Array, block: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))

    query = padded(query * jnp.asarray(scale, query.dtype), rows)
    key, value, seen = (padded(x, columns) for x in (key, value, seen))
    splash = splash_attention()
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((query.shape[1], key.shape[1]))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_kv_dkv_compute=columns,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    # A query sees the keys of its own segment.
    ones = jnp.ones(query.shape[:2], jnp.int32)
    segments = splash.SegmentIds(q=ones, kv=seen.astype(jnp.int32))
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    out = jax.vmap(kernel)(*heads_first, segment_ids=segments)
    return jnp.swapaxes(out, 1, 2)[:, :queries].astype(value.dtype)
