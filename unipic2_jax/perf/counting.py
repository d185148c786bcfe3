"""What a program multiplies, counted from its jaxpr: loops by their length, recomputation included, whatever it is compiled for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from unipic2_jax.parallel.compat import core

Chosen = Callable[[core.JaxprEqn], bool]


def count_flops(function: Any, *arguments: Any, **keywords: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of a jitted function, on all devices together.

    A multiply-add counts as two. A loop whose length is not known counts once, of a choice the larger branch counts.

    Args:
      function: jitted; arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    return jaxpr_flops(function.trace(*arguments, **keywords).jaxpr.jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr, chosen: Chosen = lambda eqn: True) -> float:
    """`count_flops` of a jaxpr, of those products alone that are `chosen`."""
    counters = {"scan": _scan, "cond": _choice, "shard_map": _on_every_device, "pallas_call": _kernel}
    total = 0.0
    for eqn in jaxpr.eqns:
        if counter := _PRODUCTS.get(eqn.primitive.name):
            total += counter(eqn) if chosen(eqn) else 0.0
        else:
            total += counters.get(eqn.primitive.name, _inside)(eqn, chosen)
    return total


def product_count(jaxpr: core.Jaxpr) -> int:
    """How many matrix products and convolutions stand in a jaxpr, those of a loop once: what a compiler has most to do with."""
    inside = lambda eqn: sum(map(product_count, inner_jaxprs(eqn.params.values())))
    return sum((eqn.primitive.name in _PRODUCTS) + inside(eqn) for eqn in jaxpr.eqns)


def is_single(eqn: core.JaxprEqn) -> bool:
    """Whether a product takes two arrays of float32, which GPUs multiply at half the rate."""
    return all(v.aval.dtype.itemsize == 4 for v in eqn.invars[:2])


def _inside(eqn: core.JaxprEqn, chosen: Chosen) -> float:
    """FLOPs of everything that a primitive calls once."""
    return sum(jaxpr_flops(jaxpr, chosen) for jaxpr in inner_jaxprs(eqn.params.values()))


def inner_jaxprs(values: Any) -> Iterator[core.Jaxpr]:
    """All jaxprs among the parameters of a primitive."""
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from inner_jaxprs(value)


def _dot(eqn: core.JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: core.JaxprEqn) -> float:
    # Every output is a sum over the kernel without its output features; a group sees a part of the inputs only, and the
    # kernel's shape says so already.
    out, kernel = eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(out) * math.prod(kernel) / features / eqn.params["batch_group_count"]


def _scan(eqn: core.JaxprEqn, chosen: Chosen) -> float:
    return eqn.params["length"] * _inside(eqn, chosen)


def _choice(eqn: core.JaxprEqn, chosen: Chosen) -> float:
    return max(jaxpr_flops(branch.jaxpr, chosen) for branch in eqn.params["branches"])


def _on_every_device(eqn: core.JaxprEqn, chosen: Chosen) -> float:
    return eqn.params["mesh"].size * _inside(eqn, chosen)


def _kernel(eqn: core.JaxprEqn, chosen: Chosen) -> float:
    """A kernel is a program of one block; the grid says how many there are."""
    return math.prod(eqn.params["grid_mapping"].grid) * _inside(eqn, chosen)


def _cudnn(products: int) -> Callable[[core.JaxprEqn], float]:
    """FLOPs of cuDNN's attention on [B, Q, N, D] and [B, K, N, D]: the backward pass computes the logits again."""

    def count(eqn: core.JaxprEqn) -> float:
        query, key = (v.aval.shape for v in eqn.invars[:2])
        return 2.0 * products * math.prod(query) * key[1]

    return count


_PRODUCTS = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _cudnn(2),
    "dot_product_attention_bwd_wrapper": _cudnn(5),
}
