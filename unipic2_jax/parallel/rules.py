"""The one table of parallelism: what each axis of a parameter or activation is, and which mesh axes it is split over.

Presets differ in the shape of the mesh alone (`mesh.PRESETS`); the table is the same for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unipic2_jax.core.registry import Registry
from unipic2_jax.parallel.compat import current_mesh

# What one axis of an array means; None: nothing is ever split there.
Logical = str | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes it is split over, outermost first.

    Raises:
      ValueError: from `spec`, for a logical axis that is not in the table, or when an array would be split over a mesh
        axis twice.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    sequence: tuple[str, ...] = ("sequence",)  # tokens that ask; those that are asked (keys, values) are whole
    heads: tuple[str, ...] = ("tensor",)
    hidden: tuple[str, ...] = ("tensor",)  # inside a feed-forward layer, and of a modulation
    embed: tuple[str, ...] = ("fsdp",)  # channels of a token, in parameters: activations are split by their batch
    stored: tuple[str, ...] = (
        "data",
        "fsdp",
    )  # the same of a network so large, and used so rarely, that no device has a copy
    vocabulary: tuple[str, ...] = ("tensor",)

    def spec(self, *axes: Logical) -> PartitionSpec:
        """The specification of an array with these logical axes."""
        used: dict[str, str] = {}
        for axis in axes:
            if axis is not None and axis not in _NAMES:
                raise ValueError(f"'{axis}' is no logical axis; the table has {', '.join(sorted(_NAMES))}.")
            for name in getattr(self, axis) if axis else ():
                if name in used:
                    raise ValueError(
                        f"An array with the axes {axes} would be split over the mesh axis '{name}' twice, for "
                        f"'{used[name]}' and for '{axis}'; change one of the two in the table."
                    )
                used[name] = axis
        return PartitionSpec(*(getattr(self, axis) if axis else None for axis in axes))


_NAMES = {field.name for field in dataclasses.fields(Rules)}
RULES = Rules()

# The last axes of a parameter by the end of its path; layers of a stack are an axis before these. A family of models registers rows
# of its own, which come first; these are of layers that most networks have. The first row that matches counts. What no row names
# is whole on every device: biases, norms, queries.
PARAMETER_ROWS = Registry("rows of parameters")
PARAMETERS: tuple[tuple[str, tuple[Logical, ...]], ...] = (
    # Into the heads or a hidden layer.
    (r"/(to_[qkv]|add_[qkv]_proj|[qkv]_proj|qkv)/kernel$", ("embed", "heads")),
    (r"/(linear_1|fc1|gate_proj|up_proj|merger_fc1)/kernel$", ("embed", "hidden")),
    (r"/linear/kernel$", ("embed", "hidden")),
    # Out of them.
    (r"/(to_out|to_add_out|out_proj|o_proj|blocks/proj)/kernel$", ("heads", "embed")),
    (r"/(linear_2|fc2|down_proj|merger_fc2)/kernel$", ("hidden", "embed")),
    # From one kind of token to another: split where it comes in.
    (r"/(context_embedder|projector_[123]|proj_out|text_projection)/kernel$", ("embed", None)),
    (r"/(embed_tokens|token_embedding)/embedding$", ("vocabulary", "embed")),
    (r"/lm_head/kernel$", ("embed", "vocabulary")),
)


def devices_along(mesh: Any, names: str | tuple[str, ...] | None) -> int:
    """Into how many parts an axis is split that has this entry in a specification."""
    return math.prod(mesh.shape[name] for name in axis_names(names))


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry in a specification."""
    return (entry,) if isinstance(entry, str) else entry or ()


def parameter_axes(path: str, ndim: int) -> tuple[Logical, ...]:
    """The logical axes of the leaf at 'path/to/leaf', be it a parameter, its gradient, its average or its moment."""
    for pattern, axes in itertools.chain(*PARAMETER_ROWS.values(), PARAMETERS):
        if re.search(pattern, path) and len(axes) <= ndim:
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the leaf at `path` lives; an axis that the devices do not divide stays whole."""
    spec = RULES.spec(*parameter_axes(path, len(shape)))
    fitting = [names if length % devices_along(mesh, names) == 0 else None for names, length in zip(spec, shape)]
    return NamedSharding(mesh, PartitionSpec(*fitting))


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings for a tree of parameters or of anything that holds trees like it, as an optimizer's state does.

    Leaves have a `shape`: arrays or descriptions of some.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return parameter_sharding(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def described(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays or descriptions as descriptions that say where each leaf of `shardings` is."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings(mesh, tree)
    )


def constrain_parameters(tree: Any) -> Any:
    """`shardings` for the compiler: on gradients and new states, so that they are where the parameters are."""
    mesh = current_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def gathered(tree: Any) -> Any:
    """Parameters as every device of an 'fsdp' axis has all of them, for a program that uses them often: where this is called."""
    mesh = current_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return tree

    def whole(place: NamedSharding) -> NamedSharding:
        kept = [tuple(name for name in axis_names(entry) if name != "fsdp") or None for entry in place.spec]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.lax.with_sharding_constraint(tree, jax.tree.map(whole, shardings(mesh, tree)))


def split_over(axis: str) -> bool:
    """Whether this logical axis is split over several devices where this is traced (`jax.set_mesh`)."""
    mesh = current_mesh()
    return not mesh.empty and devices_along(mesh, getattr(RULES, axis)) > 1


def constrain(x: jax.Array, *axes: Logical) -> jax.Array:
    """Asks the compiler to split an activation by these logical axes over the mesh in use; without one, nothing.

    An axis shorter than its devices stays whole.
    """
    mesh = current_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = RULES.spec(*axes)
    fitting = [names if length >= devices_along(mesh, names) else None for names, length in zip(spec, x.shape)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))
