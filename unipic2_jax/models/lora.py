"""Low-rank updates of the MMDiT's joint attention (paper, PDTR: rank 32, alpha 64; the targets are Flow-GRPO's).

A LoRA tree mirrors the parameter tree: where that holds {'kernel', 'bias'}, this holds {'a': [in, r], 'b': [r, out]},
with the blocks' leading axis where there is one. Passed as the collection 'lora' it is applied; left out, the network
is the reference policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# In attn (not attn2) of every block: 24 x 8 - 1 = 191 matrices of SD3.5-Medium, whose last block has no to_add_out.
LORA_TARGETS = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out", "to_q", "to_v")
GROUPS = ("dual_blocks", "blocks", "last_block")


class LoRADense(nn.Dense):
    """`nn.Dense` that adds its own low-rank update, scaled by alpha / rank, when the collection 'lora' holds one for it."""

    lora_alpha: float = 64.0

    def __call__(self, inputs: jax.Array) -> jax.Array:
        y = super().__call__(inputs)
        if not self.has_variable("lora", "a"):
            return y
        a, b = (self.get_variable("lora", name).astype(y.dtype) for name in ("a", "b"))
        return y + (inputs.astype(y.dtype) @ a) @ b * (self.lora_alpha / a.shape[-1])


def lora_targets(params: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(group, name, {'kernel', 'bias'}) of every layer that is adapted.

    Raises:
      ValueError: when `params` is not the parameter tree of an MMDiT.
    """
    groups = [group for group in GROUPS if group in params]
    if not groups:
        raise ValueError(
            f"LoRA needs the parameters of an MMDiT, but found {sorted(params)}; pass params['transformer']."
        )
    for group in groups:
        for name in LORA_TARGETS:
            if name in params[group]["attn"]:
                yield group, name, params[group]["attn"][name]


def init_lora(key: jax.Array, params: Mapping[str, Any], rank: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A new update that changes nothing yet: A ~ N(0, (1 / rank)^2), B = 0.

    Args:
      key: a PRNG key.
      params: of an MMDiT; only shapes are used, so `jax.eval_shape` works on the result.
      rank: of every update.
      dtype: of A and B; float32 keeps small steps from being rounded away.

    Raises:
      ValueError: for a rank below 1, or parameters that are not an MMDiT's.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} must be at least 1.")
    tree: dict[str, Any] = {}
    for index, (group, name, leaf) in enumerate(lora_targets(params)):
        *stack, features_in, features_out = leaf["kernel"].shape
        a = jax.random.normal(jax.random.fold_in(key, index), (*stack, features_in, rank), dtype) / rank
        b = jnp.zeros((*stack, rank, features_out), dtype)
        tree.setdefault(group, {"attn": {}})["attn"][name] = {"a": a, "b": b}
    return tree


def merge_lora(params: Mapping[str, Any], lora: Mapping[str, Any], alpha: float, dtype: Any = None) -> dict[str, Any]:
    """Parameters with the update added: kernel + A B * alpha / rank, summed in float32, in `dtype` or the kernel's own.

    Raises:
      ValueError: when `lora` does not fit `params`.
    """
    merged = dict(params)
    left = {(group, name) for group, part in lora.items() for name in part["attn"]}
    for group, name, leaf in lora_targets(params):
        if (group, name) not in left:
            continue
        left.remove((group, name))
        kernel, a, b = leaf["kernel"], lora[group]["attn"][name]["a"], lora[group]["attn"][name]["b"]
        if (*a.shape[:-1], b.shape[-1]) != kernel.shape or a.shape[-1] != b.shape[-2]:
            raise ValueError(
                f"LoRA {group}/attn/{name} of shapes {a.shape} and {b.shape} does not fit the kernel {kernel.shape}; "
                "it belongs to a model of another size."
            )
        update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)) * (alpha / a.shape[-1])
        new = (kernel.astype(jnp.float32) + update).astype(dtype or kernel.dtype)
        attn = {**merged[group]["attn"], name: {**leaf, "kernel": new}}
        merged[group] = {**merged[group], "attn": attn}
    if left:
        group, name = min(left)
        raise ValueError(
            f"LoRA adapts {group}/attn/{name}, which this model does not have; use the model it was made for."
        )
    return merged


def count_matrices(lora: Mapping[str, Any]) -> int:
    """How many weight matrices are adapted, counting every layer of a stack: 191 for SD3.5-Medium."""
    return sum(math.prod(pair["a"].shape[:-2]) for part in lora.values() for pair in part["attn"].values())


def count_parameters(lora: Mapping[str, Any]) -> int:
    """Trainable numbers: 18.8M for SD3.5-Medium at rank 32."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(lora))
