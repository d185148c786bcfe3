"""What all algorithms share of an update: parts of a batch, gradients in the memory of one micro-batch, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unipic2_jax.optim.ema import ema_update
from unipic2_jax.parallel.rules import constrain_parameters

# (trained parameters, batch) -> (scalar loss, metrics [b] each)
LossFn = Callable[[Any, dict[str, Any]], tuple[jax.Array, dict[str, jax.Array]]]


def _part(x: jax.Array, index: jax.Array, parts: int, axis: int = 0) -> jax.Array:
    """Every `parts`-th entry along `axis`, beginning at `index`.

    Strided, because the batch is split over devices in contiguous blocks: each device then holds an equal share of
    every part, and no sample moves.
    """
    shape = x.shape[:axis] + (x.shape[axis] // parts, parts) + x.shape[axis + 1 :]
    return jax.lax.dynamic_index_in_dim(x.reshape(shape), index, axis + 1, keepdims=False)


def take_part(tree: Any, index: jax.Array, parts: int, axis: int = 0) -> Any:
    """Part number `index` of so many equal parts of a batch: of every leaf every `parts`-th entry along `axis`."""
    return tree if parts == 1 else jax.tree.map(lambda x: _part(x, index, parts, axis), tree)


def count_micro_batches(samples: int, micro_batch: int | None) -> int:
    """In how many micro-batches the samples of an update are computed; None: in one.

    Raises:
      ValueError: when the size does not divide the samples.
    """
    size = samples if micro_batch is None else micro_batch
    if samples % size:
        raise ValueError(f"micro_batch {size} does not divide the {samples} samples of an update; choose a divisor.")
    return samples // size


def check_updates(samples: int, updates: int) -> None:
    """Raises a ValueError when so many samples cannot be shared by so many optimizer steps."""
    if samples % updates:
        raise ValueError(f"{samples} samples cannot be split into updates_per_rollout={updates} equal parts.")


def first_in_parts(first: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """An order of samples with those first that matter, and how many of so many equal parts (`take_part`) have any of them, at least 1.

    Args:
      first: bool [B].

    Returns:
      Indices [B] and a count.
    """
    size = first.shape[0] // parts
    ranked = jnp.argsort(~first, stable=True)
    return ranked.reshape(parts, size).T.reshape(-1), jnp.maximum(-(-jnp.sum(first) // size), 1)


def when(needed: jax.Array | None, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, or zeros like it without computing anything; None: it is needed."""
    if needed is None:
        return compute()
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(needed, compute, zeros)


def accumulate(
    loss_fn: LossFn,
    trained: Any,
    batch_at: Callable[[jax.Array, Any], dict[str, Any]],
    count: int,
    scanned: Any = None,
    needed: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of the mean loss over `count` micro-batches, one after the other.

    Args:
      loss_fn: of one micro-batch.
      trained: the parameters to differentiate.
      batch_at: from a micro-batch's number, and its entry of `scanned`, to what `loss_fn` takes.
      scanned: pytree with leading axis `count`.
      needed: bool [count], the micro-batches that are computed; the others add nothing, and their metrics are 0. None: all.

    Returns:
      Gradients (float32, shaped like `trained`) and metrics [count, b].
    """

    def visit(gradients: Any, own: tuple[jax.Array, Any, Any]) -> tuple[Any, dict[str, jax.Array]]:
        *at, wanted = own
        differentiate = lambda: jax.value_and_grad(loss_fn, has_aux=True)(trained, batch_at(*at))
        (_, metrics), new = when(wanted, differentiate)
        weight = 1.0 / count
        gradients = jax.tree.map(lambda g, n: g + weight * n.astype(jnp.float32), gradients, new)
        return constrain_parameters(gradients), metrics

    zeros = constrain_parameters(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained))
    return jax.lax.scan(visit, zeros, (jnp.arange(count), scanned, needed))


def optimizer_step(
    state: Any,
    gradients: Any,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    ema_interval: int,
    good: jax.Array,
) -> Any:
    """A state after one optimizer step; where `good` is False, the state as it was.

    Args:
      state: a NamedTuple with `lora`, `opt_state`, `ema` and `step`; other fields stay.
    """
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.lora)
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.lora)
    lora = optax.apply_updates(state.lora, changes)
    ema = ema_update(state.ema, lora, state.step, ema_decay, ema_interval)
    new = state._replace(lora=lora, opt_state=opt_state, ema=ema, step=state.step + 1)
    return constrain_parameters(jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state))
