"""What the backward pass finds of the forward pass, and what it computes again: named policies, the same for every network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

# Name -> what is kept besides each layer's input; from the least memory to the least work.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # What a kernel of attention gives; XLA's own attention computes its logits again all the same.
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    # And what dense layers give. What is between them, above all attention's [tokens, tokens], is cheaper to compute again
    # than to write down and read back (docs/performance.md).
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
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
