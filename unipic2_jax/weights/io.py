"""Safetensors files and folders: lazy, dtype-exact reading and streamed, sharded writing.

The format (a length, a JSON header, raw little-endian data) is read and written here rather than by the `safetensors`
package because a tensor must be sliced without loading its neighbours and written without holding its whole file, in
every dtype that checkpoints use.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from unipic2_jax.core.files import write_json
from unipic2_jax.core.strict import read_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

# As in diffusers and transformers: the stem of the weight files of each kind of folder.
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
MAX_SHARD_BYTES = 5 * 10**9
COPY_BYTES = 1 << 24  # at a time, from where a file is put together
# The official library refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
# What PyTorch writes with pickle.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file. `tensor[index]` reads that part and nothing else; `np.asarray(tensor)` reads it all."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)[index]
        # A mapping per read: its pages leave the process with it, so a long load does not accumulate the whole file.
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        return np.array(raw.view(self.dtype).reshape(self.shape)[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self[...]
        return array if dtype is None else array.astype(dtype)


def read_header(file: str | os.PathLike) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """(tensors by name, `__metadata__`) of one safetensors file, by the rules of the official library.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, cut short, or breaks a rule of the format: a header of at most 100 MB that starts with
        '{', tensors that follow each other from byte 0 to the file's last one, each as large as its dtype and shape say.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}; check the path.")
    if file.suffix in PICKLES:
        raise ValueError(no_pickles(file))
    size = file.stat().st_size
    with file.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size:
            raise ValueError(f"{file} is not a safetensors file or was cut short; copy or download it again.")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file} has a header of {length} bytes, and the format allows {MAX_HEADER_BYTES}.")
        text = f.read(length)
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        header = read_json(text)
        metadata = header.pop("__metadata__", {})
        if not _is_texts(metadata):
            raise ValueError("its __metadata__ is no object of texts")
        tensors = {name: _described(file, name, entry, 8 + length) for name, entry in header.items()}
        _check_filled(tensors, 8 + length, size)
    except ValueError as error:
        raise ValueError(
            f"{file} is not a sound safetensors file: of its header, {error}; copy or download it again."
        ) from error
    return tensors, metadata


def _is_texts(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _described(file: Path, name: str, entry: Any, start: int) -> LazyTensor:
    """The tensor of an entry of a header; `start` is where data begin. Raises ValueError with a clause."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"the entry of {name!r} lacks its dtype, shape or data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']!r}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"{name!r} has the shape {shape!r}, which is no list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name!r} has the data_offsets {offsets!r}, which are no two positions")
    tensor = LazyTensor(file, tuple(shape), DTYPES[entry["dtype"]], start + offsets[0])
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"{name!r} has {offsets[1] - offsets[0]} bytes where its dtype and shape need {tensor.nbytes}")
    return tensor


def _check_filled(tensors: Mapping[str, LazyTensor], start: int, size: int) -> None:
    """Raises ValueError with a clause unless the tensors fill the file's bytes from `start` to `size` without a hole."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise ValueError(
                f"{name!r} begins at byte {tensor.offset - start} of the data where the tensor before it ends at {end - start}"
            )
        end += tensor.nbytes
    if end != size:
        cut = ", so that it was cut short" if size < end else ""
        raise ValueError(f"the tensors end at byte {end} and the file at byte {size}{cut}")


def no_pickles(file: str | os.PathLike) -> str:
    """The sentence about a file that PyTorch wrote with pickle."""
    return (
        f"{file} is a pickle, which can run any code when it is opened, so it is never read here; save its tensors as "
        "safetensors where you trust it: `safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)`."
    )


class Checkpoint(Mapping[str, LazyTensor]):
    """Tensors of one or several safetensors files, by name. Opening reads headers only."""

    def __init__(self, place: str | os.PathLike, files: Iterable[str | os.PathLike]):
        self.place, self.files = Path(place), tuple(Path(f) for f in files)
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, LazyTensor] = {}
        for file in self.files:
            tensors, metadata = read_header(file)
            if twice := sorted(set(tensors) & set(self._tensors)):
                raise ValueError(
                    f"{file} and {self._tensors[twice[0]].file} both hold {twice[0]!r}; remove one of them."
                )
            self._tensors.update(tensors)
            self.metadata.update(metadata)

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def origin(self, name: str | None = None) -> str:
        """The file that holds this tensor, else the place that should: for error messages."""
        return str(self._tensors[name].file if name in self._tensors else self.place)


def weight_stem(folder: str | os.PathLike) -> str | None:
    """The stem of the safetensors weights in a folder ('model', 'model.fp16', ...), plain before variants, or None."""
    folder = Path(folder)
    for base in (DIFFUSERS_STEM, TRANSFORMERS_STEM):
        if (folder / f"{base}.safetensors").is_file() or (folder / f"{base}.safetensors.index.json").is_file():
            return base
    for base in (DIFFUSERS_STEM, TRANSFORMERS_STEM):
        for file in sorted(folder.glob(f"{base}.*.safetensors")):
            if "-of-" not in file.name:
                return file.name.removesuffix(".safetensors")
        for file in sorted(folder.glob(f"{base}.safetensors.index.*.json")):
            return f"{base}.{file.name.removeprefix(f'{base}.safetensors.index.').removesuffix('.json')}"
    return None


def _index_file(folder: Path, stem: str) -> Path:
    base, _, variant = stem.partition(".")
    return folder / f"{base}.safetensors.index{'.' + variant if variant else ''}.json"


def open_folder(folder: str | os.PathLike, stem: str | None = None) -> Checkpoint:
    """The weights in a folder: `STEM.safetensors`, or the shards that `STEM.safetensors.index.json` lists.

    Raises FileNotFoundError (no folder, no weights, a listed shard absent) or ValueError (damaged) in one sentence.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    stem = stem or weight_stem(folder)
    if stem is None:
        if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
            raise ValueError(no_pickles(pickles[0]))
        raise FileNotFoundError(
            f"{folder} holds no {DIFFUSERS_STEM}.safetensors, {TRANSFORMERS_STEM}.safetensors or index of shards; "
            "copy the weights there."
        )
    single, index = folder / f"{stem}.safetensors", _index_file(folder, stem)
    if single.is_file():
        return Checkpoint(folder, [single])
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}; check the path.")
    try:
        weight_map = read_json(index.read_bytes())["weight_map"]
        if not _is_texts(weight_map):
            raise TypeError("it must name a file for every tensor")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of shards (no readable 'weight_map'); copy it again.") from error
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if absent := [f.name for f in files if not f.is_file()]:
        raise FileNotFoundError(f"{folder} lacks the shard {absent[0]} that {index.name} lists; copy it there.")
    checkpoint = Checkpoint(folder, files)
    if lost := [name for name in weight_map if name not in checkpoint]:
        raise ValueError(f"{folder / weight_map[lost[0]]} lacks {lost[0]!r} although {index.name} lists it there.")
    return checkpoint


class _Shard:
    """A safetensors file being written. Data goes to disk at once, one scratch file per item size.

    Wide items come first in the final file, so that every tensor is aligned (PyTorch refuses to view it otherwise);
    the header comes before them all and is known last, hence the scratch files.
    """

    def __init__(self, folder: Path, number: int):
        self.folder, self.number, self.nbytes = folder, number, 0
        self.entries: dict[int, list[tuple[str, str, tuple[int, ...], int]]] = {}

    def _scratch(self, itemsize: int) -> Path:
        return self.folder / f".writing-{os.getpid()}-{self.number}-{itemsize}"

    def add(self, name: str, array: np.ndarray) -> None:
        size = array.dtype.itemsize
        with self._scratch(size).open("ab" if size in self.entries else "wb") as f:
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.entries.setdefault(size, []).append((name, CODES[array.dtype], array.shape, array.nbytes))
        self.nbytes += array.nbytes

    def names(self) -> list[str]:
        return [name for group in self.entries.values() for name, *_ in group]

    def close(self, file: Path, metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        begin, sizes = 0, sorted(self.entries, reverse=True)
        for size in sizes:
            for name, code, shape, nbytes in self.entries[size]:
                header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
                begin += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        partial = file.with_name(f".{file.name}.partial")
        with partial.open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for size in sizes:
                with self._scratch(size).open("rb") as data:
                    while block := data.read(COPY_BYTES):
                        f.write(block)
                self._scratch(size).unlink()
        partial.replace(file)

    def discard(self) -> None:
        for size in self.entries:
            self._scratch(size).unlink(missing_ok=True)


def write_folder(
    folder: str | os.PathLike,
    stem: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes `STEM.safetensors`, or shards and their index when the tensors exceed `max_shard_bytes`.

    Holds one tensor at a time. Files appear under their names when complete; older weights of the same stem are then
    removed. `metadata` defaults to {'format': 'pt'}, which transformers insists on. Returns the weight files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    old = {folder / f"{stem}.safetensors", _index_file(folder, stem), *folder.glob(f"{stem}-*-of-*.safetensors")}
    shards, seen = [_Shard(folder, 0)], set()
    try:
        for name, array in tensors:
            if array.dtype not in CODES:
                raise ValueError(f"Safetensors cannot hold {name!r} of type {array.dtype}; convert it first.")
            if name in seen:
                raise ValueError(f"Two tensors are named {name!r}; a file holds each name once.")
            seen.add(name)
            if shards[-1].nbytes and shards[-1].nbytes + array.nbytes > max_shard_bytes:
                shards.append(_Shard(folder, len(shards)))
            shards[-1].add(name, array)
        total = sum(shard.nbytes for shard in shards)
        files = [folder / f"{stem}.safetensors"]
        if len(shards) > 1:
            files = [folder / f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file.name for shard, file in zip(shards, files) for name in shard.names()}
        for shard, file in zip(shards, files):
            shard.close(file, metadata)
    finally:
        for shard in shards:
            shard.discard()
    written = set(files)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        written.add(_index_file(folder, stem))
        write_json(_index_file(folder, stem), index)
    for file in old - written:
        file.unlink(missing_ok=True)
    return files


def write_file(file: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]], metadata: Any = None) -> Path:
    """One safetensors file, whatever its size."""
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"The file {file} must end in .safetensors.")
    return write_folder(file.parent, file.name.removesuffix(".safetensors"), tensors, 2**63, metadata)[0]
