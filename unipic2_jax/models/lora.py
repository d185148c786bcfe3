"""Low-rank updates of dense layers, and which of a network's layers have one.

A LoRA tree mirrors the parameter tree: where that holds {'kernel', 'bias'}, this holds {'a': [in, r], 'b': [r, out]},
with the blocks' leading axis where there is one. Passed as the collection 'lora' the kernel is W + a b; left out, the network is
what it was. What scales an update, alpha / rank of a file or of a stage, is in the tree that a network is given (`scaled`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name

from unipic2_jax.parallel.rules import split_over


class LoRADense(nn.Module):
    """x [..., I] -> [..., features]; adds its own low-rank update when the collection 'lora' holds one for it.

    For remat policies the result is called 'dense', and what is between the two matrices of the update 'low_rank'.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        # As one matrix product XLA's CPU backend is up to twice as fast; accelerators do not care, unless a sample's
        # tokens are on several of them: then the batch's and the tokens' axes cannot become one.
        lead, x = x.shape[:-1], x.astype(self.dtype)
        if not split_over("sequence"):
            x = x.reshape(-1, x.shape[-1])
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(self.dtype) for name in ("a", "b"))
            y = y + checkpoint_name(x @ a, "low_rank") @ b
        return checkpoint_name(y, "dense").reshape(*lead, self.features)


def scaled(lora: Mapping[str, Any], scale: float | jax.Array) -> dict[str, Any]:
    """The update times a number."""
    return {
        name: {**part, "a": part["a"] * scale} if "a" in part else scaled(part, scale) for name, part in lora.items()
    }


def joined(loras: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of several updates as one, whose rank is the sum of theirs."""
    flat: dict[tuple[str, ...], list[Mapping[str, jax.Array]]] = {}
    for lora in loras:
        for path, pair in pairs(lora).items():
            flat.setdefault(path, []).append(pair)
    along = {"a": -1, "b": -2}
    return traverse_util.unflatten_dict(
        {
            (*path, side): jnp.concatenate([pair[side] for pair in layers], axis=axis)
            for path, layers in flat.items()
            for side, axis in along.items()
        }
    )


def pairs(lora: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    """Path of a layer -> its {'a', 'b'}, in the order of the tree."""
    layers: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for (*path, side), leaf in traverse_util.flatten_dict(dict(lora)).items():
        layers.setdefault(tuple(path), {})[side] = leaf
    return layers


def rank_of(lora: Mapping[str, Any]) -> int:
    """The rank of a tree whose layers have one."""
    ranks = {pair["a"].shape[-1] for pair in pairs(lora).values()}
    if len(ranks) != 1:
        raise ValueError(f"The LoRA tree has ranks {sorted(ranks)}; it must have one.")
    return ranks.pop()


def merge_lora(params: Mapping[str, Any], lora: Mapping[str, Any], dtype: Any = None) -> dict[str, Any]:
    """Parameters with the update added: kernel + a b, summed in float32, in `dtype` or the kernel's own.

    Raises:
      ValueError: when `lora` does not fit `params`.
    """
    flat = traverse_util.flatten_dict(dict(params))
    for path, pair in pairs(lora).items():
        name, a, b = "/".join(path), pair["a"], pair["b"]
        if (kernel := flat.get((*path, "kernel"))) is None:
            raise ValueError(f"LoRA adapts {name}, which this model does not have; use the model that it was made for.")
        if (*a.shape[:-1], b.shape[-1]) != kernel.shape or a.shape[-1] != b.shape[-2]:
            raise ValueError(
                f"LoRA {name} of shapes {a.shape} and {b.shape} does not fit the kernel {kernel.shape}; "
                "it belongs to a model of another size."
            )
        update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32))
        flat[*path, "kernel"] = (kernel.astype(jnp.float32) + update).astype(dtype or kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def count_matrices(lora: Mapping[str, Any]) -> int:
    """How many weight matrices are adapted, counting every layer of a stack: 191 for SD3.5-Medium."""
    return sum(math.prod(pair["a"].shape[:-2]) for pair in pairs(lora).values())


def count_parameters(lora: Mapping[str, Any]) -> int:
    """Trainable numbers: 18.8M for SD3.5-Medium at rank 32."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(lora))
