"""Which layers of the MMDiT a LoRA adapts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

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
            matches = f".{dotted}".endswith(f".{target}")
        else:
            matches = re.search(target, dotted) is not None
        if matches:
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
