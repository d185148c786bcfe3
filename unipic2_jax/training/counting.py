"""What a program multiplies, counted from its jaxpr: loops by their length, recomputation included, whatever it is compiled for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count_flops(function: Any, *arguments: Any, **keywords: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of a jitted function, on all devices together.

    A multiply-add counts as two. A loop whose length is not known counts once, of a choice the larger branch counts.

    Args:
      function: jitted; arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    return _count(function.trace(*arguments, **keywords).jaxpr.jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    return sum(_COUNTERS.get(eqn.primitive.name, _inside)(eqn) for eqn in jaxpr.eqns)


def _inside(eqn: core.JaxprEqn) -> float:
    """Of everything that a primitive calls once."""
    return sum(map(_count, _jaxprs(eqn.params.values())))


def _jaxprs(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _jaxprs(value)


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


def _scan(eqn: core.JaxprEqn) -> float:
    return eqn.params["length"] * _inside(eqn)


def _choice(eqn: core.JaxprEqn) -> float:
    return max(_count(branch.jaxpr) for branch in eqn.params["branches"])


_COUNTERS = {"dot_general": _dot, "conv_general_dilated": _convolution, "scan": _scan, "cond": _choice}
