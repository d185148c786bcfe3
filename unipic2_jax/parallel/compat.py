"""Every name of JAX and Orbax that a release has moved or may move. When one does, it is changed here and nowhere else.

Seen with JAX 0.10.2 to 0.12 and orbax-checkpoint 0.12.8.
"""

from __future__ import annotations

import os
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
    "keep_programs",
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


def keep_programs(folder: str | os.PathLike, seconds: float) -> None:
    """Compiled programs that took so many seconds, and those of the processes that this one starts, are kept in a folder.

    What the environment or JAX's configuration says otherwise stays.
    """
    environment = {
        "JAX_COMPILATION_CACHE_DIR": os.fspath(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": seconds,
    }
    for name, value in environment.items():
        if not os.environ.get(name):
            os.environ[name] = str(value)
            jax.config.update(name.lower(), value)


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
