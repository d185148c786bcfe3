"""One table per network, read in both directions: which PyTorch tensor is which Flax leaf, and how it is turned.

A network's table is a tuple of `Rule`s (`models/sd3/mmdit_names.py` and its neighbours). `to_flax` and `to_torch` are the only
two readers. Both stream: a tensor is read, turned and placed before the next one is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from unipic2_jax.core.errors import closest
from unipic2_jax.weights.precision import Precision

# A transform is a permutation of axes, torch -> Flax, so that it is exactly invertible, costs no arithmetic, and a
# slice of the Flax leaf is a slice of the stored tensor. `None` leaves the tensor alone, whatever its rank.
TRANSFORMS: dict[str, tuple[int, ...] | None] = {
    "copy": None,
    "linear": (1, 0),  # [out, in] <-> [in, out]
    "conv": (2, 3, 1, 0),  # [out, in, h, w] <-> [h, w, in, out]
    "conv3d": (2, 3, 4, 1, 0),  # [out, in, t, h, w] <-> [t, h, w, in, out]
}

FLOATS = {np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: the PyTorch tensor `torch` is the Flax leaf `path` ('dual_blocks/attn/to_q/kernel').

    With `layers`, `torch` holds `{i}` and torch layer i sits at index `i - layers.start` of the leaf's leading axis.
    An empty `path` names a tensor that some files carry and no network uses (a constant buffer, a tied copy): it may be
    present or absent. `aliases` are names that other versions of the original give the same tensor; they are read, never
    written.
    """

    torch: str
    path: str
    transform: str = "copy"
    layers: range | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.transform not in TRANSFORMS:
            raise ValueError(
                f"Rule {self.torch!r} asks for transform {self.transform!r}; take one of {list(TRANSFORMS)}."
            )
        if ("{i}" in self.torch) != (self.layers is not None):
            raise ValueError(f"Rule {self.torch!r} must have both '{{i}}' and `layers`, or neither.")

    def names(self) -> Iterator[tuple[str, int | None]]:
        """(torch name, index on the leading axis of the leaf or None) for every tensor of this row."""
        if self.layers is None:
            yield self.torch, None
        else:
            for index, i in enumerate(self.layers):
                yield self.torch.replace("{i}", str(i)), index

    def alias_names(self) -> Iterator[tuple[str, str]]:
        """(alias, torch name) for every tensor of this row."""
        for alias in self.aliases:
            for i, (name, _) in zip(self.layers or (0,), self.names()):
                yield alias.replace("{i}", str(i)), name

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of one tensor, from the shape of its leaf."""
        shape = tuple(shape) if self.layers is None else tuple(shape[1:])
        axes = TRANSFORMS[self.transform]
        return shape if axes is None else tuple(shape[axes.index(k)] for k in range(len(axes)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a/b': x}, in the order of the tree."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def expected_shapes(rules: Iterable[Rule], abstract: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every torch name with its stored shape, for a network whose (abstract) parameters are given.

    Raises ValueError when the table and the network disagree: that is a fault of the table, not of a file.
    """
    leaves, shapes, filled = flatten(abstract), {}, set()
    for rule in rules:
        if not rule.path:
            continue
        if rule.path not in leaves:
            raise ValueError(
                f"Rule {rule.torch!r} names the leaf {rule.path!r}, "
                f"which the network does not have{closest(rule.path, leaves)}."
            )
        leaf = leaves[rule.path]
        axes = TRANSFORMS[rule.transform]
        rank = len(leaf.shape) - (rule.layers is not None)
        wrong_rank = axes is not None and len(axes) != rank
        if wrong_rank or (rule.layers is not None and leaf.shape[0] != len(rule.layers)):
            raise ValueError(
                f"Rule {rule.torch!r} ({rule.transform}, layers {rule.layers}) "
                f"does not fit leaf {rule.path!r} of shape {leaf.shape}."
            )
        for name, _ in rule.names():
            if name in shapes:
                raise ValueError(f"Two rules name the tensor {name!r}.")
            shapes[name] = rule.torch_shape(leaf.shape)
        if rule.path in filled:
            raise ValueError(f"Two rules fill the leaf {rule.path!r}.")
        filled.add(rule.path)
    if unfilled := [path for path in leaves if path not in filled]:
        raise ValueError(f"No rule fills the leaf {unfilled[0]!r}{_more(unfilled)}.")
    return shapes


class _Renamed(Mapping[str, Any]):
    """Tensors under the names of a table where the file has some under aliases."""

    def __init__(self, source: Mapping[str, Any], stored: Mapping[str, str]):
        self._source, self._stored = source, dict(stored)
        self.metadata = getattr(source, "metadata", {})

    def __getitem__(self, name: str) -> Any:
        return self._source[self._stored.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        names = {stored: name for name, stored in self._stored.items()}
        return (names.get(stored, stored) for stored in self._source)

    def __len__(self) -> int:
        return len(self._source)

    def origin(self, name: str | None = None) -> str:
        """As `io.Checkpoint.origin`."""
        return _origin(self._source)(None if name is None else self._stored.get(name, name))


def _origin(source: Mapping[str, Any]) -> Callable[..., str]:
    return getattr(source, "origin", lambda name=None: "The source")


def canonical(rules: Iterable[Rule], source: Mapping[str, Any]) -> Mapping[str, Any]:
    """`source` under the table's own names: a tensor that is there under an alias only is found under its name."""
    pairs = ((alias, name) for rule in rules for alias, name in rule.alias_names())
    stored = {name: alias for alias, name in pairs if alias in source and name not in source}
    return _Renamed(source, stored) if stored else source


def unused_names(rules: Iterable[Rule]) -> set[str]:
    """Names that a file may carry and no network uses (rules with an empty path)."""
    return {name for rule in rules if not rule.path for name, _ in rule.names()}


def check(rules: Iterable[Rule], source: Mapping[str, Any], abstract: Mapping[str, Any]) -> None:
    """Raises one sentence (ValueError) for the first missing, extra or mis-shaped tensor. Reads headers only."""
    rules = tuple(rules)
    source = canonical(rules, source)
    shapes, origin = expected_shapes(rules, abstract), _origin(source)
    missing = [name for name in shapes if name not in source]
    extra = sorted(set(source) - set(shapes) - unused_names(rules))
    if missing:
        near = closest(missing[0], extra or list(source))
        raise ValueError(
            f"{origin()} lacks the tensor {missing[0]!r} of shape {shapes[missing[0]]}{_more(missing)}{near}."
        )
    if extra:
        raise ValueError(
            f"{origin(extra[0])} holds the tensor {extra[0]!r}{_more(extra)}, "
            f"which this network does not have{closest(extra[0], shapes)}."
        )
    for name, shape in shapes.items():
        if tuple(source[name].shape) != shape:
            raise ValueError(
                f"{origin(name)} holds {name!r} with shape {tuple(source[name].shape)} "
                f"where this network needs {shape}; check its config.json."
            )
        if np.dtype(source[name].dtype) not in FLOATS:
            raise ValueError(
                f"{origin(name)} holds {name!r} as {source[name].dtype}; convert it to a floating-point format first."
            )


def promote(dtypes: Iterable[Any]) -> np.dtype:
    """The narrowest dtype that holds all of these exactly (fp16 with bf16 gives fp32)."""
    dtypes = {np.dtype(d) for d in dtypes}
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.dtype(np.float64) if np.dtype(np.float64) in dtypes else np.dtype(np.float32)


def loaded_dtype(stored: Iterable[Any], dtype: Any) -> np.dtype:
    """What a leaf of tensors that are stored in these dtypes is loaded in; `dtype` as in `to_flax`."""
    if isinstance(dtype, Precision):
        return promote(dtype.kept(one) for one in stored)
    return promote(stored) if dtype is None else np.dtype(dtype)


def to_flax(
    rules: Iterable[Rule],
    source: Mapping[str, Any],
    abstract: Mapping[str, Any],
    sharding: Any = None,
    dtype: Any = None,
    wanted: Callable[[str], bool] = lambda path: True,
) -> dict[str, Any]:
    """Parameters of a network from named PyTorch tensors.

    Args:
      rules: the network's table.
      source: name -> array with `.shape`, `.dtype` and slicing; read lazily (see `weights/io.py`).
      abstract: tree of shapes of the parameters (`jax.eval_shape(module.init, ...)['params']`).
      sharding: None (default device), one `jax.sharding.Sharding`, or a tree of them like `abstract`. A process reads
        only the slices that its own devices hold.
      dtype: of the result; None keeps what is stored (a stacked leaf of mixed layers takes `promote` of them), a `Precision`
        keeps frozen tensors as it says.
      wanted: which leaves are read, by path; the others are missing in the result.

    Raises ValueError with one sentence for a missing, extra or mis-shaped tensor.
    """
    rules = tuple(rules)
    check(rules, source, abstract)
    source, leaves = canonical(rules, source), flatten(abstract)
    shardings = flatten(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(leaves, sharding)
    by_path = {rule.path: rule for rule in rules if rule.path}
    return unflatten(
        {
            path: _load_leaf(by_path[path], source, leaf.shape, shardings[path], dtype)
            for path, leaf in leaves.items()
            if wanted(path)
        }
    )


def leaf_dtype(rule: Rule, source: Mapping[str, Any]) -> np.dtype:
    """The narrowest dtype that holds every tensor of this row exactly."""
    return promote(source[name].dtype for name, _ in rule.names())


def read_leaf(rule: Rule, source: Mapping[str, Any], index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fills `out` with the part `index` of a leaf, one stored tensor at a time, reading only what lies inside."""
    axes = TRANSFORMS[rule.transform]

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if axes is None:
            return np.asarray(source[name][index])
        stored = tuple(index[axes.index(k)] for k in range(len(axes)))
        return np.asarray(source[name][stored]).transpose(axes)

    names = [name for name, _ in rule.names()]
    if rule.layers is None:
        out[...] = read(names[0], index)
    else:
        for row, layer in enumerate(range(*index[0].indices(len(names)))):
            out[row] = read(names[layer], index[1:])


def _load_leaf(rule: Rule, source: Mapping[str, Any], shape: tuple[int, ...], sharding: Any, dtype: Any) -> jax.Array:
    dtype = loaded_dtype((source[name].dtype for name, _ in rule.names()), dtype)

    def shard(index: Any) -> np.ndarray:
        out = np.empty(tuple(len(range(*s.indices(n))) for s, n in zip(index, shape)), dtype)
        read_leaf(rule, source, index, out)
        return out

    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(shape, sharding, shard)


def to_torch(rules: Iterable[Rule], params: Mapping[str, Any], dtypes: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """(torch name, C-contiguous array) for every tensor of the network, in the table's order, one at a time.

    Args:
      dtypes: None keeps each leaf's own, one dtype casts all, a mapping of names restores each tensor's.
    """
    rules = tuple(rules)
    expected_shapes(rules, params)
    leaves = flatten(params)
    for rule in rules:
        if rule.path:
            yield from split_leaf(rule, leaves[rule.path], dtypes)


def split_leaf(rule: Rule, leaf: Any, dtypes: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """One row of `to_torch`."""
    axes = TRANSFORMS[rule.transform]
    if not getattr(leaf, "is_fully_addressable", True):
        raise ValueError(
            f"The leaf {rule.path!r} is spread over several hosts; "
            "gather it, or restore the checkpoint on one host, before exporting."
        )
    for name, index in rule.names():
        array = np.asarray(leaf if index is None else leaf[index])
        if axes is not None:
            array = array.transpose(np.argsort(axes))
        dtype = dtypes.get(name) if isinstance(dtypes, Mapping) else dtypes
        yield name, np.ascontiguousarray(array, None if dtype is None else np.dtype(dtype)).reshape(array.shape)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
