"""Checkpoints as they circulate, under the names and in the floats that the networks' tables know.

Trainers leave their wrappers in the names of tensors, and 8-bit files keep a scale beside each weight, in ComfyUI's two
spellings. A tensor of 8 bits is read as bfloat16, which holds every value of both kinds exactly; with a scale it is
multiplied in float32 and rounded once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from unipic2_jax.weights import io

FP8 = tuple(np.dtype(dtype) for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What torch.compile and FSDP put between the parts of a name, and DistributedDataParallel and DeepSpeed before it.
INNER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = ("module.",)
# What a file of one network calls that network.
OWNERS = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# Beside 'X.weight': factors of it, and what only arithmetic in 8 bits needs.
SCALES = ("scale_weight", "weight_scale")
UNUSED = ("scale_input", "input_scale", "comfy_quant")
MARKER = "scaled_fp8"


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A lazy tensor of 8 bits, or with a scale, as the numbers that it stands for."""

    tensor: Any
    scale: np.ndarray | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        return BFLOAT16 if self.tensor.dtype in FP8 else self.tensor.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        values = self.tensor[index]
        if self.scale is not None:
            values = values.astype(np.float32) * np.broadcast_to(self.scale, self.shape)[index]
        return values.astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self[...]
        return array if dtype is None else array.astype(dtype)


class Variant(dict):
    """Lazy tensors by their plain names.

    Attributes:
      metadata: of the files.
      notes: clauses about what is read otherwise than it is stored.
    """

    def __init__(self, source: io.Checkpoint, stored: Mapping[str, str]):
        super().__init__()
        self.metadata, self._source, self._stored = source.metadata, source, stored
        self.notes: list[str] = []

    def origin(self, name: str | None = None) -> str:
        """As `io.Checkpoint.origin`."""
        return self._source.origin(None if name is None else self._stored.get(name, name))


def open_folder(folder: str | os.PathLike) -> Variant:
    """The weights in the folder of one network; errors are those of `io.open_folder` and `plain`."""
    return plain(io.open_folder(folder), (*OUTER, *OWNERS))


def plain(source: io.Checkpoint, prefixes: Iterable[str] = OUTER) -> Variant:
    """`source` without wrappers, 8 bits and scales; `prefixes` are left out of the names where all names have them.

    Raises:
      ValueError: two tensors have the same plain name, or a scale does not fit its weight.
    """
    stored, left_out = _plain_names(source, tuple(prefixes))
    variant = Variant(source, stored)
    beside = {name: _beside(name, stored) for name in stored if name == "weight" or name.endswith(".weight")}
    hidden = {other for names in beside.values() for other in names}
    hidden |= {name for name in stored if name.rpartition(".")[2] == MARKER}
    kinds: Counter[Any] = Counter()
    scaled = False
    for name in stored:
        if name in hidden:
            continue
        tensor = source[stored[name]]
        scales = [other for other in beside.get(name, ()) if other.rpartition(".")[2] in SCALES]
        scale = _scale(variant, name, tensor, source[stored[scales[0]]]) if scales else None
        scaled = scaled or scale is not None
        kinds[tensor.dtype] += tensor.dtype in FP8
        variant[name] = tensor if scale is None and tensor.dtype not in FP8 else Scaled(tensor, scale)
    if left_out:
        variant.notes.append(f"{', '.join(map(repr, left_out))} in the names of tensors is left out")
    if eight := [f"{count} tensors of {kind}" for kind, count in kinds.items() if count]:
        times = ", times their scales" if scaled else ""
        variant.notes.append(f"{' and '.join(eight)} are read into bfloat16{times}")
    return variant


def _plain_names(names: Iterable[str], prefixes: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """(plain name -> stored name, what was left out)."""
    stored, left_out = {name: name for name in names}, []

    def rename(without: Callable[[str, str], str], what: str) -> None:
        nonlocal stored
        renamed = {without(plain, what): name for plain, name in stored.items()}
        if len(renamed) < len(stored):
            raise ValueError(f"Without {what!r} in their names two tensors have the same one; remove one of them.")
        stored = renamed
        left_out.append(what)

    for what in dict.fromkeys(part for name in stored for part in INNER.findall(name)):
        rename(lambda name, what: name.replace(what, ""), what)
    while stored and (
        common := next((p for p in prefixes if all(name.startswith(p) or name == MARKER for name in stored)), None)
    ):
        rename(str.removeprefix, common)
    return stored, left_out


def _beside(weight: str, names: Mapping[str, Any]) -> list[str]:
    """What belongs to a weight: its scales, and what is not used."""
    stem = weight.removesuffix("weight")
    return [stem + kind for kind in (*SCALES, *UNUSED) if stem + kind in names]


def _scale(variant: Variant, name: str, tensor: Any, scale: Any) -> np.ndarray:
    """float32, of a shape that fits the tensor's: one number, or one for each row."""
    shape = tuple(tensor.shape)
    if math.prod(scale.shape) == 1:
        return np.asarray(scale).astype(np.float32).reshape(())
    if not shape or math.prod(scale.shape) != shape[0] or shape[0] not in scale.shape:
        raise ValueError(
            f"{variant.origin(name)} holds a scale of shape {tuple(scale.shape)} for {name!r} of shape {shape}; only one scale "
            "for a tensor, or for each of its rows, can be read."
        )
    return np.asarray(scale).astype(np.float32).reshape(-1, *[1] * (len(shape) - 1))
