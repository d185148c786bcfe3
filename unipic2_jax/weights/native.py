"""Our own checkpoint of one network: a folder in diffusers layout whose safetensors are replaced by an Orbax checkpoint.

    transformer/config.json     as it came
    transformer/params/         the parameter tree (Orbax), layers stacked, in the stored dtypes
    transformer/tensors.json    what the way back to PyTorch needs: stem, file metadata, dtype of every tensor
    transformer/unused.safetensors   tensors of the original that no network uses, when it had any

A stacked leaf has one dtype. Where the file's layers differ it is the narrowest that holds them all exactly, and
`tensors.json` names each tensor's own, so that the way back restores every bit.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from unipic2_jax.core.errors import closest
from unipic2_jax.core.files import write_json
from unipic2_jax.parallel.compat import orbax_v1
from unipic2_jax.weights import io, table, variants
from unipic2_jax.weights.table import Rule

PARAMS, MANIFEST, UNUSED = "params", "tensors.json", "unused.safetensors"
FORMAT, VERSION = "unipic2-jax weights", 1
BATCH_BYTES = 1 << 28

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`tensors.json`.

    Attributes:
      stem: of the safetensors that the way back writes.
      metadata: of their header.
      dtypes: torch name -> dtype, for every tensor.
    """

    stem: str
    metadata: dict[str, str]
    dtypes: dict[str, str]

    def write(self, folder: Path) -> None:
        """Most tensors share one dtype: it is written once, and the others by name."""
        common = collections.Counter(self.dtypes.values()).most_common(1)[0][0]
        values = {
            "format": FORMAT,
            "version": VERSION,
            "stem": self.stem,
            "metadata": self.metadata,
            "dtype": common,
            "other_dtypes": {name: dtype for name, dtype in self.dtypes.items() if dtype != common},
        }
        write_json(folder / MANIFEST, values)

    @classmethod
    def read(cls, folder: Path, rules: Iterable[Rule]) -> Manifest:
        """Raises FileNotFoundError or ValueError in one sentence."""
        file = folder / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {MANIFEST}; convert the original again.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"its format is {values['format']!r} version {values['version']}")
            names = [name for rule in rules if rule.path for name, _ in rule.names()]
            dtypes = {name: values["other_dtypes"].get(name, values["dtype"]) for name in names}
            return cls(values["stem"], values["metadata"], dtypes)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a manifest of this version ({error}); convert the original again."
            ) from error


def is_native(folder: str | os.PathLike) -> bool:
    """Whether a network's folder holds our own checkpoint rather than safetensors."""
    return (Path(folder) / PARAMS).is_dir()


def leaf_shapes(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """path -> shape and dtype of every leaf of an Orbax checkpoint. Raises ValueError when it is damaged."""
    ocp = orbax_v1()

    checkpoint = Path(checkpoint).absolute()
    try:
        flat = table.flatten(ocp.metadata(checkpoint).metadata)
    except Exception as error:  # Orbax raises many kinds for a damaged folder; all mean the same to the reader.
        raise ValueError(f"{checkpoint} is not a complete Orbax checkpoint ({error}); convert it again.") from error
    return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in flat.items()}


def read_leaves(checkpoint: str | os.PathLike, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """Some leaves of an Orbax checkpoint, as stored."""
    ocp = orbax_v1()

    shapes, paths = leaf_shapes(checkpoint), tuple(paths)
    wanted: dict[str, Any] = dict.fromkeys(shapes, ocp.PLACEHOLDER)
    wanted.update({path: np.empty(shapes[path].shape, shapes[path].dtype) for path in paths})
    loaded = table.flatten(ocp.load(Path(checkpoint).absolute(), table.unflatten(wanted)))
    return {path: np.asarray(loaded[path]) for path in paths}


def write(
    folder: str | os.PathLike, rules: Iterable[Rule], source: Mapping[str, Any], abstract: Any, stem: str
) -> None:
    """Writes a network's checkpoint from named PyTorch tensors, holding about one tensor in memory.

    Leaves are assembled in scratch files on disk, which Orbax then reads from.

    Raises ValueError in one sentence for a missing, extra or mis-shaped tensor.
    """
    folder, rules = Path(folder).absolute(), tuple(rules)
    table.check(rules, source, abstract)
    source = table.canonical(rules, source)
    folder.mkdir(parents=True, exist_ok=True)
    leaves, by_path = table.flatten(abstract), {rule.path: rule for rule in rules if rule.path}
    with tempfile.TemporaryDirectory(prefix=".assembling-", dir=folder) as scratch:
        maps = {}
        for number, (path, leaf) in enumerate(leaves.items()):
            dtype = table.leaf_dtype(by_path[path], source)
            raw = np.memmap(
                Path(scratch) / str(number), np.uint8, "w+", 0, (int(np.prod(leaf.shape)) * dtype.itemsize,)
            )
            maps[path] = raw.view(dtype).reshape(leaf.shape)
            table.read_leaf(by_path[path], source, tuple(slice(n) for n in leaf.shape), maps[path])
            raw.flush()
            # Reopened, so that the pages just written leave this process.
            maps[path] = np.memmap(Path(scratch) / str(number), np.uint8, "r").view(dtype).reshape(leaf.shape)
            del raw
        save_tree(folder / PARAMS, table.unflatten(maps))
    dtypes = {name: str(np.dtype(source[name].dtype)) for rule in by_path.values() for name, _ in rule.names()}
    Manifest(stem, dict(getattr(source, "metadata", {})), dtypes).write(folder)
    if unused := sorted(table.unused_names(rules) & set(source)):
        io.write_file(folder / UNUSED, ((name, np.asarray(source[name])) for name in unused))


def save(folder: str | os.PathLike, rules: Iterable[Rule], params: Mapping[str, Any], stem: str) -> None:
    """Writes a network's checkpoint from parameters, in their own dtypes."""
    folder, rules, leaves = Path(folder).absolute(), tuple(rules), table.flatten(params)
    table.expected_shapes(rules, params)
    folder.mkdir(parents=True, exist_ok=True)
    save_tree(folder / PARAMS, params)
    dtypes = {name: str(leaves[rule.path].dtype) for rule in rules if rule.path for name, _ in rule.names()}
    Manifest(stem, {"format": "pt"}, dtypes).write(folder)


def save_tree(checkpoint: str | os.PathLike, tree: Mapping[str, Any]) -> None:
    """An Orbax checkpoint of a tree of arrays that appears whole or not at all. Host arrays are not copied."""
    ocp = orbax_v1()

    context = ocp.Context()
    # Random-looking floats do not compress, and a copy of each array at once would be the whole model.
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = max(1 << 28, 2 * max(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    with context:
        ocp.save(Path(checkpoint).absolute(), dict(tree), overwrite=True)


def load_tree(
    checkpoint: str | os.PathLike,
    abstract: Mapping[str, Any],
    sharding: Any = None,
    dtype: Any = None,
    wanted: Callable[[str], bool] = lambda path: True,
) -> Any:
    """The tree of an Orbax checkpoint on its sharding.

    Args:
      abstract: tree of shapes.
      sharding, dtype, wanted: as in `table.to_flax`.

    Raises ValueError in one sentence when a leaf is missing, extra or of another shape.
    """
    ocp = orbax_v1()

    check_tree(checkpoint, abstract)
    stored, leaves = leaf_shapes(checkpoint), table.flatten(abstract)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = table.flatten(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(leaves, sharding)
    structs: dict[str, Any] = dict.fromkeys(leaves, ocp.PLACEHOLDER)
    for path, leaf in leaves.items():
        if wanted(path):
            of = table.loaded_dtype([stored[path].dtype], dtype)
            structs[path] = jax.ShapeDtypeStruct(leaf.shape, of, sharding=shardings[path])
    loaded = table.flatten(ocp.load(Path(checkpoint).absolute(), table.unflatten(structs)))
    return table.unflatten({path: leaf for path, leaf in loaded.items() if wanted(path)})


def check_tree(checkpoint: str | os.PathLike, abstract: Mapping[str, Any]) -> None:
    """Raises ValueError in one sentence when the checkpoint's leaves are not these. Reads no weights."""
    stored, wanted = leaf_shapes(checkpoint), table.flatten(abstract)
    if missing := [path for path in wanted if path not in stored]:
        raise ValueError(f"{checkpoint} lacks the leaf {missing[0]!r}{closest(missing[0], stored)}.")
    if extra := [path for path in stored if path not in wanted]:
        raise ValueError(
            f"{checkpoint} holds the leaf {extra[0]!r}, which this network does not have{closest(extra[0], wanted)}."
        )
    for path, leaf in wanted.items():
        if stored[path].shape != tuple(leaf.shape):
            raise ValueError(
                f"{checkpoint} holds {path!r} with shape {stored[path].shape} where this network needs "
                f"{tuple(leaf.shape)}; check its config.json."
            )


def tensors(folder: str | os.PathLike, rules: Iterable[Rule]) -> tuple[Manifest, Iterator[tuple[str, np.ndarray]]]:
    """(manifest, PyTorch tensors with their original names, dtypes and bits), a few leaves in memory at a time."""
    folder, rules = Path(folder), tuple(rule for rule in rules if rule.path)
    manifest, shapes = Manifest.read(folder, rules), leaf_shapes(folder / PARAMS)
    table.expected_shapes(rules, table.unflatten(shapes))

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        dtypes = {name: _dtype(dtype) for name, dtype in manifest.dtypes.items()}
        for batch in _batches(rules, shapes):
            leaves = read_leaves(folder / PARAMS, [rule.path for rule in batch])
            for rule in batch:
                yield from table.split_leaf(rule, leaves.pop(rule.path), dtypes)
        if (folder / UNUSED).is_file():
            yield from ((name, np.asarray(t)) for name, t in io.Checkpoint(folder, [folder / UNUSED]).items())

    return manifest, stream()


def _batches(rules: Iterable[Rule], shapes: Mapping[str, Any]) -> Iterator[list[Rule]]:
    """Rules whose leaves are read together: Orbax takes long to open, whatever it then reads."""
    batch: list[Rule] = []
    nbytes = 0
    for rule in rules:
        size = int(np.prod(shapes[rule.path].shape)) * shapes[rule.path].dtype.itemsize
        if batch and nbytes + size > BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(rule)
        nbytes += size
    if batch:
        yield batch


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def check_component(folder: str | os.PathLike, rules: Iterable[Rule], abstract: Mapping[str, Any]) -> None:
    """Raises one sentence when the weights in a network's folder, safetensors or our own, do not fit the network."""
    if is_native(folder):
        check_tree(Path(folder) / PARAMS, abstract)
    else:
        table.check(rules, variants.open_folder(folder), abstract)


def load_component(
    folder: str | os.PathLike,
    rules: Iterable[Rule],
    abstract: Mapping[str, Any],
    sharding: Any = None,
    dtype: Any = None,
    wanted: Callable[[str], bool] = lambda path: True,
) -> dict[str, Any]:
    """Parameters of one network from its folder, be it safetensors (diffusers, transformers) or our own checkpoint.

    What safetensors hold under other names or in 8 bits is read as `weights/variants.py` says, with a line in the log.
    Streams onto `sharding`; arguments and errors are those of `table.to_flax`.
    """
    if is_native(folder):
        return load_tree(Path(folder) / PARAMS, abstract, sharding, dtype, wanted)
    source = variants.open_folder(folder)
    for note in source.notes:
        logger.warning("%s: %s.", folder, note)
    return table.to_flax(rules, source, abstract, sharding, dtype, wanted)


def with_changes(
    folder: str | os.PathLike, rules: Iterable[Rule], params: Mapping[str, Any], changed: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a network's folder, with what they hold now where a leaf's path is in `changed`.

    Everything else is read from the folder, bit for bit and one tensor at a time; what changed is written in the dtype that
    the folder's tensor has.

    Raises FileNotFoundError or ValueError in one sentence when the folder is not what it was.
    """
    rules = tuple(rule for rule in rules if rule.path)
    leaves = table.flatten(params)
    if is_native(folder):
        dtypes = {name: _dtype(dtype) for name, dtype in Manifest.read(Path(folder), rules).dtypes.items()}
        kept = [rule for rule in rules if rule.path not in changed]
        shapes = leaf_shapes(Path(folder) / PARAMS)
        for batch in _batches(kept, shapes):
            read = read_leaves(Path(folder) / PARAMS, [rule.path for rule in batch])
            for rule in batch:
                yield from table.split_leaf(rule, read.pop(rule.path), dtypes)
        for rule in rules:
            if rule.path in changed:
                yield from table.split_leaf(rule, leaves[rule.path], dtypes)
        return
    source = table.canonical(rules, variants.open_folder(folder))
    for rule in rules:
        if rule.path in changed:
            yield from table.split_leaf(rule, leaves[rule.path], {name: source[name].dtype for name, _ in rule.names()})
        else:
            yield from ((name, np.asarray(source[name])) for name, _ in rule.names())
