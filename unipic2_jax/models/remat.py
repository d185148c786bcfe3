"""Equal layers one after the other: what the backward pass finds of them and what it computes again, and whether they are a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from unipic2_jax.parallel.mesh import platform

NAMED = jax.checkpoint_policies.save_only_these_names


def _attention_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """cuDNN's attention gives its backward pass what it needs beside the output, which has no name; splash's has one."""
    return primitive.name.startswith("dot_product_attention_fwd")


# Name -> what is kept besides each layer's input; from the least memory to the least work.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # What a kernel of attention gives; XLA's own attention computes its logits again all the same.
    "attention": jax.checkpoint_policies.save_from_both_policies(NAMED("attention"), _attention_kernel),
    # And what dense layers give (`models.lora.LoRADense`). What is between them, above all attention's [tokens, tokens], is cheaper
    # to compute again than to write down and read back (docs/performance.md).
    "dots": jax.checkpoint_policies.save_from_both_policies(NAMED("attention", "dense", "low_rank"), _attention_kernel),
    "none": None,  # everything is kept, nothing computed again
}


def check_policy(name: str) -> None:
    """Raises a ValueError for a name that is none."""
    if name not in POLICIES:
        raise ValueError(f"remat is '{name}'; use one of {', '.join(POLICIES)}.")


def rematerialised(layer: type[nn.Module], policy: str, *, scanned: bool = True) -> type[nn.Module]:
    """The layer under a policy; names of parameters do not depend on it.

    Args:
      scanned: in a scan nothing can be merged with the forward pass, so the barrier against that is not needed.
    """
    check_policy(policy)
    return layer if policy == "none" else nn.remat(layer, prevent_cse=not scanned, policy=POLICIES[policy])


def stacked(layer: type[nn.Module], policy: str, length: int, *, unroll: int = 0, **options: Any) -> Callable[..., Any]:
    """`length` equal layers under a policy, with their parameters (and LoRA) stacked along a leading axis. See `nn.scan`.

    Args:
      unroll: layers in a turn of the compiled loop. 0: one, but on GPUs all of them where a layer keeps more than its input, because
        XLA copies whatever a loop keeps into the array of all layers and out of it again (docs/performance.md).
      options: of `nn.scan`.
    """
    keeps = policy in ("attention", "dots") and platform() == "gpu"
    unroll = min(unroll or (length if keeps else 1), length)
    return nn.scan(
        rematerialised(layer, policy, scanned=unroll < length),
        **{"variable_axes": {"params": 0, "lora": 0}, "split_rngs": {"params": True}, **options},
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
