"""Every name of JAX and Orbax that a release has moved or may move. When one does, it is changed here and nowhere else.

Seen with JAX 0.10.2 to 0.12 and orbax-checkpoint 0.12.8.
"""

from __future__ import annotations

from types import ModuleType

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

__all__ = [
    "AbstractMesh",
    "auto_axes",
    "core",
    "current_mesh",
    "mesh_utils",
    "multihost_utils",
    "orbax",
    "orbax_v1",
    "shard_map",
    "splash_attention",
    "topologies",
    "use_mesh",
]

# The mesh that a program is traced under, and a context that sets it for this thread.
current_mesh, use_mesh = jax.sharding.get_abstract_mesh, jax.set_mesh
shard_map = jax.shard_map


def auto_axes(count: int) -> tuple[AxisType, ...]:
    """Axes over which the compiler splits; linen's logical partitioning fails on the explicit ones, which are JAX's default."""
    return (AxisType.Auto,) * count


def topologies() -> ModuleType:
    """What describes devices that are not there."""
    from jax.experimental import topologies as module

    return module


def splash_attention() -> ModuleType:
    """TPU's attention kernel."""
    from jax.experimental.pallas.ops.tpu import splash_attention as module

    return module


def orbax() -> ModuleType:
    """Orbax, whose import takes seconds."""
    import orbax.checkpoint as module

    return module


def orbax_v1() -> ModuleType:
    """Its newer interface."""
    from orbax.checkpoint import v1 as module

    return module
