"""Low-rank updates of dense layers, and which of a network's layers have one.

A LoRA tree mirrors the parameter tree: where that holds {'kernel', 'bias'}, this holds {'a': [in, r], 'b': [r, out]},
with the blocks' leading axis where there is one. Passed as the collection 'lora' the kernel is W + a b; left out, the network is
what it was. What scales an update, alpha / rank of a file or of a stage, is in the tree that a network is given (`scaled`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from unipic2_jax.parallel.rules import split_over

# Of every block: 24 x 8 - 1 = 191 matrices of SD3.5-Medium, whose last block has no to_add_out (paper, PDTR; the targets are
# Flow-GRPO's).
LORA_TARGETS = tuple(
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out", "to_q", "to_v")
)
# Names of targets may be written as their layers are called in diffusers.
DIFFUSERS_NAMES = (
    (r"\bto_out\.0\b", "to_out"),
    (r"\bnet\.0\.proj\b", "linear_1"),
    (r"\bnet\.2\b", "linear_2"),
)
GROUPS = ("dual_blocks", "blocks", "last_block")


class LoRADense(nn.Module):
    """x [..., I] -> [..., features]; adds its own low-rank update when the collection 'lora' holds one for it."""

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
            y = y + (x @ a) @ b
        return y.reshape(*lead, self.features)


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
            (*path, side): jnp.concatenate([pair[side] for pair in found], axis=axis)
            for path, found in flat.items()
            for side, axis in along.items()
        }
    )


def pairs(lora: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    """Path of a layer -> its {'a', 'b'}, in the order of the tree."""
    found: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for (*path, side), leaf in traverse_util.flatten_dict(dict(lora)).items():
        found.setdefault(tuple(path), {})[side] = leaf
    return found


def rank_of(lora: Mapping[str, Any]) -> int:
    """The rank of a tree whose layers have one."""
    ranks = {pair["a"].shape[-1] for pair in pairs(lora).values()}
    if len(ranks) != 1:
        raise ValueError(f"The LoRA tree has ranks {sorted(ranks)}; it must have one.")
    return ranks.pop()


def is_target(path: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether a layer ('dual_blocks', 'attn', 'to_q') is one of `targets`.

    A target is the end of a layer's name, as in peft ('attn.to_q', 'ff.net.2'; 'to_q' is attn2's too), or a regex that finds a match
    in the name here ('^dual_blocks.*linear'). Layers of a stack are adapted together.
    """
    dotted = ".".join(path)
    for target in targets:
        if re.fullmatch(r"[\w.]+", target):
            for theirs, ours in DIFFUSERS_NAMES:
                target = re.sub(theirs, ours, target)
            found = f".{dotted}".endswith(f".{target}")
        else:
            found = re.search(target, dotted) is not None
        if found:
            return True
    return False


def lora_targets(
    params: Mapping[str, Any], targets: Sequence[str] = LORA_TARGETS
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of the layer, its kernel or description of it) of every dense layer that is adapted, always in one order.

    Args:
      params: of an MMDiT.
      targets: see `is_target`.

    Raises:
      ValueError: when `params` is not the parameter tree of an MMDiT, or a target is none of its layers.
    """
    if not any(group in params for group in GROUPS):
        raise ValueError(
            f"LoRA needs the parameters of an MMDiT, but found {sorted(params)}; pass params['transformer']."
        )
    layers = {}
    for (*path, name), leaf in traverse_util.flatten_dict(dict(params)).items():
        if name == "kernel" and leaf.ndim == (3 if path[0] in GROUPS[:2] else 2):
            layers[tuple(path)] = leaf
    for target in targets:
        try:
            used = any(is_target(path, (target,)) for path in layers)
        except re.error as error:
            raise ValueError(f"The LoRA target '{target}' is neither a name nor a regex ({error}).") from error
        if not used:
            names = sorted({path[-1] for path in layers})
            raise ValueError(f"The LoRA target '{target}' is no layer of the transformer; it has {', '.join(names)}.")
    order = lambda path: (GROUPS.index(path[0]) if path[0] in GROUPS else len(GROUPS), path)
    for path in sorted(layers, key=order):
        if is_target(path, targets):
            yield path, layers[path]


def init_lora(
    key: jax.Array,
    params: Mapping[str, Any],
    rank: int,
    dtype: Any = jnp.float32,
    targets: Sequence[str] = LORA_TARGETS,
) -> dict[str, Any]:
    """A new update that changes nothing yet: A ~ N(0, (1 / rank)^2), B = 0.

    Args:
      key: a PRNG key.
      params: of an MMDiT; only shapes are used, so `jax.eval_shape` works on the result.
      rank: of every update.
      dtype: of A and B; float32 keeps small steps from being rounded away.
      targets: which layers; see `is_target`.

    Raises:
      ValueError: for a rank below 1, parameters that are not an MMDiT's, or a target that is none of its layers.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} must be at least 1.")
    flat: dict[tuple[str, ...], jax.Array] = {}
    for index, (path, kernel) in enumerate(lora_targets(params, targets)):
        *stack, features_in, features_out = kernel.shape
        drawn = jax.random.normal(jax.random.fold_in(key, index), (*stack, features_in, rank), dtype)
        flat[*path, "a"] = drawn / rank
        flat[*path, "b"] = jnp.zeros((*stack, rank, features_out), dtype)
    return traverse_util.unflatten_dict(flat)


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
