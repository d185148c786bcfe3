"""Which floats a run's networks are kept in, trained in and computed in: one policy for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: Any) -> np.dtype:
    """A dtype for parameters and arithmetic; None is float32. Raises ValueError for one that is not supported."""
    name = "float32" if dtype is None else str(jnp.dtype(dtype))
    if name not in DTYPES:
        raise ValueError(f"The dtype {name!r} is not supported for a model; choose one of {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def inference_dtype(dtype: Any = None) -> Any:
    """The dtype itself, or where there is none that in which a model draws and answers here: bfloat16, and float32 on a CPU, which has
    no arithmetic of its own for it."""
    if dtype is not None:
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Precision:
    """A policy. Norms, softmax, log-probabilities and losses are float32 in every one of them.

    Attributes:
      stored: of networks that are not trained.
      trained: of what is trained, its optimizer and its average, for as long as it is trained and from one stage of a run to
        the next. New networks are drawn in it, too.
      compute: of the arithmetic; parameters of other dtypes are cast where they are used.
      as_files: 16-bit floats of a file are kept bit for bit, whatever `stored` is, and what is exported has the dtypes of the
        files that it came from.
    """

    stored: np.dtype
    trained: np.dtype
    compute: np.dtype
    as_files: bool = False

    def kept(self, dtype: Any) -> np.dtype:
        """What a frozen tensor of this dtype is kept in."""
        dtype = np.dtype(dtype)
        return dtype if self.as_files and dtype.itemsize == 2 else self.stored

    def hold(self, params: Any) -> Any:
        """Parameters that are not trained now as they are kept; leaves that are so already stay the same objects."""
        as_kept = lambda leaf: leaf if leaf.dtype == self.kept(leaf.dtype) else leaf.astype(self.kept(leaf.dtype))
        return jax.tree.map(as_kept, params)

    def lift(self, params: Any) -> Any:
        """Copies of parameters to be trained."""
        return jax.tree.map(lambda leaf: jnp.array(leaf, self.trained, copy=True), params)


_SINGLE, _BRAIN = np.dtype(np.float32), jnp.dtype(jnp.bfloat16)
# What `config.precision` of a run may be.
PRECISIONS = {
    "float32": Precision(_SINGLE, _SINGLE, _SINGLE),
    "mixed": Precision(_BRAIN, _SINGLE, _BRAIN, as_files=True),
}


def as_precision(value: Precision | Any = None) -> Precision:
    """A policy itself, the name of one, or a dtype that everything has; None is float32.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(value, Precision):
        return value
    if isinstance(value, str) and value in PRECISIONS:
        return PRECISIONS[value]
    dtype = check_dtype(value)
    return Precision(dtype, dtype, dtype)
