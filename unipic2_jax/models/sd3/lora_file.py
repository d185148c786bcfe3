"""LoRA files of SD3.5: every layout that circulates is read into one form (`lora_writing` writes it).

An update is W + up down x scale. What says the scale differs by layout (`_scales`); here it is always a number beside the two
matrices, so that no reader can forget it. Layers are named as in diffusers ('transformer_blocks.0.attn.to_q').
docs/weights.md has the table of layouts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from unipic2_jax.core.errors import closest
from unipic2_jax.core.strict import read_object
from unipic2_jax.models import registry
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.sd3 import single_file
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.weights import io, table
from unipic2_jax.weights.table import Rule

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
LAYOUTS = ("diffusers", "kohya")

# What stands before a layer's name, by component.
PREFIXES = {
    "text_encoder": ("text_encoder.", "text_encoders.clip_l.transformer.", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "text_encoders.t5xxl.transformer.", "lora_te3_"),
    "transformer": (
        *("transformer.", "model.diffusion_model.", "diffusion_model."),
        *("lora_unet_", "lora_transformer_", "lycoris_", ""),
    ),
}
# peft puts its own in front of any of them.
_PREFIXES = [
    (component, peft + prefix)
    for component, prefixes in PREFIXES.items()
    for prefix in prefixes
    for peft in ("base_model.model.", "")
]
# The end of a tensor's name -> what it is of its layer.
ENDS = (
    (r"\.lora_A(\.\w+)?\.weight|\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight", "down"),
    (r"\.lora_B(\.\w+)?\.weight|\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
    (r"\.lora_magnitude_vector(\.\w+)?(\.weight)?|\.dora_scale", "magnitude"),
)
_END = re.compile("|".join(f"(?P<{kind}>(?:{pattern})$)" for pattern, kind in ENDS))
# The first diffusers versions kept LoRA in attention processors, whose outputs have no number.
_PROCESSOR = (re.compile(r"\.processor\.((?:to|add)_\w+?)(_lora\.)"), r".\1\2")
# Of other methods than LoRA.
FOREIGN = {"hada_": "a LoHa", "lokr_": "a LoKr", "lora_mid": "a LoCon with a middle matrix", ".diff": "a difference"}


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of one layer's weight [out, in] or [out, in, h, w], in PyTorch's order of axes.

    Attributes:
      down: [r, in] or [r, in, h, w]; up: [out, r]; of the file's dtype.
      scale: that their product is multiplied by.
      magnitude: float32, of a DoRA: what the rows [out, 1] or columns [1, in] of the sum are as long as; None: no DoRA.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The shape of the product."""
        return self.down.shape[0]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a LoRA file holds: component -> layer -> update.

    Attributes:
      origin: the file, for error messages.
    """

    updates: Mapping[str, Mapping[str, Update]]
    origin: str

    def __str__(self) -> str:
        """The adapter in a few words."""
        parts = []
        for component, layers in self.updates.items():
            ranks, scales = ({f"{getattr(u, what):g}" for u in layers.values()} for what in ("rank", "scale"))
            dora = ", DoRA" if any(u.magnitude is not None for u in layers.values()) else ""
            rank, scale = (", ".join(sorted(numbers, key=float)) for numbers in (ranks, scales))
            parts.append(f"{component}: {len(layers)} matrices, rank {rank}, scale {scale}{dora}")
        return "; ".join(parts)


def is_lora_file(source: str | os.PathLike) -> bool:
    """Whether a safetensors file, or a folder with one, holds LoRA matrices."""
    source = Path(source)
    if source.is_dir():
        return any(is_lora_file(file) for file in source.glob("*.safetensors"))
    return any((match := _END.search(name)) and match.lastgroup == "down" for name in io.read_header(source)[0])


def find_file(source: str | os.PathLike) -> Path:
    """The LoRA file in a folder, or the file itself.

    Raises:
      FileNotFoundError, ValueError: there is none, or there are several of other names.
    """
    source = Path(source)
    if not source.is_dir():
        if not source.is_file():
            raise FileNotFoundError(f"There is no LoRA file or folder {source}; check the path.")
        return source
    for name in (FILE_NAME, PEFT_FILE):
        if (source / name).is_file():
            return source / name
    files = sorted(file for file in source.glob("*.safetensors") if is_lora_file(file))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(f"{source} holds {len(files)} LoRA files, {files[0].name} first; name one of them.")
    raise FileNotFoundError(f"{source} holds no LoRA file ({FILE_NAME} or {PEFT_FILE}); check the path.")


def read_lora(source: str | os.PathLike, configs: Mapping[str, ModelConfig]) -> Adapter:
    """A LoRA file, or the folder that holds one.

    Args:
      configs: of the model's networks by folder name ('transformer', 'text_encoder', ...).

    Raises ValueError or FileNotFoundError in one sentence: no such file, a tensor that is of none of the model's layers, a layer
    that lacks a half or has another size.
    """
    file = find_file(source)
    checkpoint = io.Checkpoint(file, [file])
    fields = _fields(file, checkpoint.metadata)
    shapes = {component: _shapes(config) for component, config in configs.items() if component in PREFIXES}
    places = {component: _places(component, configs[component], own) for component, own in shapes.items()}
    halves: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name in checkpoint:
        stem, kind = _parse(name, file)
        component, key = _layer(stem, places, name, file, configs)
        parts = halves.setdefault((component, key), {})
        if kind in parts:
            raise ValueError(f"{file} holds {name!r} a second time, under another name; keep one of them.")
        parts[kind] = np.asarray(checkpoint[name][...])
    if not any("down" in parts for parts in halves.values()):
        raise ValueError(f"{file} holds no LoRA matrices (*.lora_A.weight, *.lora_down.weight); check the file.")
    made: dict[str, dict[str, Update]] = {}
    for (component, key), parts in halves.items():
        if missing := [kind for kind in ("down", "up") if kind not in parts]:
            raise ValueError(f"{file} has no '{missing[0]}' matrix for the layer '{key}'; copy or export it again.")
        own, peft = places[component][key], fields.get(component, {})
        if peft.get("use_dora") and "magnitude" not in parts:
            raise ValueError(f"{file} is a DoRA and has no magnitude for the layer '{key}'; copy or export it again.")
        _check_shapes(f"{component}.{key}", parts, own, shapes[component], file)
        for layer, update in _pieces(own, parts, _scale(key, parts, peft, file)):
            if layer in made.setdefault(component, {}):
                raise ValueError(f"{file} has two updates of {component}.{layer}, in two layouts; keep one of them.")
            made[component][layer] = update
    return Adapter(made, str(file))


def _fields(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """peft's `LoraConfig` by component, as a header or the file beside it has them."""
    if raw := metadata.get(METADATA_KEY):
        try:
            values = json.loads(raw)
            by_component: dict[str, dict[str, Any]] = {}
            for key, value in values.items():
                component, _, field = key.partition(".")
                known = component in PREFIXES
                by_component.setdefault(component if known else "transformer", {})[field if known else key] = value
            return by_component
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} has an unreadable {METADATA_KEY} in its header ({error}); export it again."
            ) from error
    beside = file.parent / PEFT_CONFIG
    return {"transformer": read_object(beside)} if file.name == PEFT_FILE and beside.is_file() else {}


def _parse(name: str, file: Path) -> tuple[str, str]:
    """(the layer's name as it is written, what the tensor is of it)."""
    plain = re.sub(*_PROCESSOR, name)
    if (end := _END.search(plain)) is None:
        foreign = next((what for part, what in FOREIGN.items() if part in name), None)
        what = f"is part of {foreign}, not of a LoRA" if foreign else "is no part of a LoRA"
        raise ValueError(f"{file} holds the tensor {name!r}, which {what}: merge it in the tool that made it.")
    return plain[: end.start()], cast(str, end.lastgroup)  # every way to match is a named group


def _places(
    component: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[str, single_file.Piece]]]:
    """A layer's name as some layout writes it -> the layers of the network that it is, and which part of it each is."""
    places: dict[str, list[tuple[str, single_file.Piece]]] = {}
    for layer in shapes:
        whole = single_file.Piece(layer)
        # Newer transformers have CLIP's encoder without a name of its own.
        names = dict.fromkeys((layer, layer.removesuffix(".0"), layer.removeprefix("text_model.")), whole)
        if component == "transformer":
            piece = single_file.PIECES[component](f"{layer}.weight", config)
            names.setdefault(piece.name.removesuffix(".weight"), piece)
        flat = {name.replace(".", "_"): piece for name, piece in names.items()}
        for name, piece in {**flat, **names}.items():
            places.setdefault(name, []).append((layer, piece))
    return places


def _layer(
    stem: str,
    places: Mapping[str, Mapping[str, Any]],
    name: str,
    file: Path,
    configs: Mapping[str, ModelConfig],
) -> tuple[str, str]:
    """(component, key of its `_places`) of a layer's name as it is written."""
    for component, prefix in _PREFIXES:
        if stem.startswith(prefix):
            rest = stem.removeprefix(prefix)
            if rest in places.get(component, ()):
                return component, rest
    component, prefix = next(pair for pair in _PREFIXES if stem.startswith(pair[1]))
    if component not in configs:
        raise ValueError(f"{file} adapts {name!r}, but this model has no {component}; use the model it was made for.")
    near = closest(stem.removeprefix(prefix), places[component])
    raise ValueError(f"{file} adapts {name!r}, a layer that this model's {component} does not have{near}.")


def _scale(layer: str, parts: Mapping[str, np.ndarray], fields: Mapping[str, Any], file: Path) -> float:
    """alpha / rank: alpha of the layer's own tensor, else of the header's pattern or field, else the rank, as diffusers has it."""
    rank = parts["down"].shape[0]
    alpha = fields.get("lora_alpha", rank)
    for pattern, value in (fields.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            alpha = value
            break
    if "alpha" in parts:
        alpha = float(parts["alpha"].astype(np.float32).reshape(-1)[0])
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{file} has the alpha {alpha!r} for the layer '{layer}'; it must be a number.")
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _pieces(
    places: list[tuple[str, single_file.Piece]], parts: Mapping[str, np.ndarray], scale: float
) -> Iterator[tuple[str, Update]]:
    """The updates of the layers that one stored layer is: three of a fused query, key and value."""
    down, up, magnitude = parts["down"], parts["up"], parts.get("magnitude")
    up = up.reshape(up.shape[:2])
    if magnitude is not None:
        magnitude = magnitude.astype(np.float32)
        columns = magnitude.ndim == 2 and magnitude.shape[0] == 1  # peft's of a convolution is [1, out, 1, 1]
        magnitude = magnitude.reshape((1, -1) if columns else (-1, 1))
    for layer, piece in places:
        rows = np.arange(len(up)).reshape(piece.parts, -1)[piece.part]
        rows = np.roll(rows, len(rows) // 2) if piece.swapped else rows
        part_magnitude = magnitude if magnitude is None or magnitude.shape[0] == 1 else magnitude[rows]
        yield layer, Update(down, up[rows], scale, part_magnitude)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Layer -> the stored shape of its weight, of those that multiply."""
    network = registry.NETWORKS[config.CLASS_NAME]
    rules = [rule for rule in network.rules(config) if rule.transform != "copy"]
    shapes = table.expected_shapes(network.rules(config), network.abstract(config))
    return {name.removesuffix(".weight"): shapes[name] for rule in rules for name, _ in rule.names()}


def _check_shapes(
    name: str,
    parts: Mapping[str, np.ndarray],
    places: list[tuple[str, single_file.Piece]],
    shapes: Mapping[str, tuple[int, ...]],
    file: Path,
) -> None:
    """Raises ValueError when the matrices of a stored layer do not fit the weights that they are of."""
    layer, piece = places[0]
    outputs, *inputs = shapes[layer]
    rows, down, up = outputs * piece.parts, parts["down"].shape, parts["up"].shape
    rank = down[0] if down else 0
    fitting = rank and [*down] == [rank, *inputs] and [*up[:2]] == [rows, rank] and set(up[2:]) <= {1}
    if not fitting:
        raise ValueError(
            f"{file} has matrices of {down} and {up} for {name}, which are to make an update of {(rows, *inputs)}; it belongs to a "
            "model of another size."
        )
    lengths = parts["magnitude"].shape if "magnitude" in parts else None
    if lengths not in (None, (rows,), (rows, 1), (1, inputs[0]), (1, rows, 1, 1), (rows, 1, 1, 1)):
        raise ValueError(f"{file} has a magnitude of {lengths} for {name}, whose update is {(rows, *inputs)}.")


# Into the trees of networks.


def leaves(layers: Mapping[str, Update], config: ModelConfig, scale: float = 1.0) -> dict[str, dict[str, np.ndarray]]:
    """Path of a kernel's layer -> float32 {'a', 'b'} and, of a DoRA, 'magnitude', as the parameter tree has its axes.

    The scale is in 'a'. Of a stack all layers are there: smaller ranks, and layers without an update, are filled up with zeros.
    """
    network = registry.NETWORKS[config.CLASS_NAME]
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for rule in network.rules(config):
        row_updates = [layers.get(name.removesuffix(".weight")) for name, _ in rule.names()] if rule.path else []
        if rule.transform == "copy" or not any(row_updates):
            continue
        rows = [_row(rule, update, max(u.rank for u in row_updates if u), row_updates, scale) for update in row_updates]
        stacked = {side: np.stack([row[side] for row in rows]) for side in rows[0]}
        path = rule.path.removesuffix("/kernel")
        arrays[path] = stacked if rule.layers is not None else {side: x[0] for side, x in stacked.items()}
    return arrays


def _row(
    rule: Rule, update: Update | None, rank: int, row_updates: list[Update | None], scale: float
) -> dict[str, np.ndarray]:
    """One layer of `leaves`. A magnitude that is not a number leaves the lengths as they are."""
    like = next(u for u in row_updates if u)
    columns = any(u is not None and u.magnitude is not None and u.magnitude.shape[0] == 1 for u in row_updates)
    axes = np.asarray(table.TRANSFORMS[rule.transform])
    inputs, outputs = math.prod(like.down.shape[1:]), like.up.shape[0]
    row = {"a": np.zeros((inputs, rank), np.float32), "b": np.zeros((rank, outputs), np.float32)}
    if any(u is not None and u.magnitude is not None for u in row_updates):
        row["magnitude"] = np.full((inputs, 1) if columns else (1, outputs), np.nan, np.float32)
    if update is not None:
        down = update.down.astype(np.float32)
        # [r, in, h, w] -> [h, w, in, r], as the kernel [h, w, in, out] has its axes.
        down = down.transpose(*axes[:-1], 0) if down.ndim > 2 else down.T
        row["a"][:, : update.rank] = down.reshape(inputs, update.rank) * (update.scale * scale)
        row["b"][: update.rank] = update.up.astype(np.float32).T
        if update.magnitude is not None:
            row["magnitude"][...] = update.magnitude.T
    return row


def low_rank(leaves: Mapping[str, Mapping[str, Any]], config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`leaves` as (the LoRA tree of what a network applies beside its weights, what can only be merged into them).

    The MMDiT applies updates of its dense layers; a DoRA, and all updates of other networks, are merged.
    """
    dense = {rule.path for rule in registry.NETWORKS[config.CLASS_NAME].rules(config) if rule.transform == "linear"}
    beside = isinstance(config, MMDiTConfig)
    applied = {
        path: pair for path, pair in leaves.items() if beside and "magnitude" not in pair and f"{path}/kernel" in dense
    }
    tree = table.unflatten({f"{path}/{side}": x for path, pair in applied.items() for side, x in pair.items()})
    return tree, {path: pair for path, pair in leaves.items() if path not in applied}


def merge(params: Mapping[str, Any], leaves: Mapping[str, Mapping[str, Any]], dtype: Any = None) -> dict[str, Any]:
    """Parameters of a network with `leaves` in them, summed in float32; kernels in `dtype`, or each in its own."""
    flat = table.flatten(params)
    for path, pair in leaves.items():
        kernel = flat[f"{path}/kernel"]
        new = _merged(kernel, pair["a"], pair["b"], pair.get("magnitude"))
        flat[f"{path}/kernel"] = new.astype(dtype or kernel.dtype)
    return table.unflatten(flat)


@jax.jit
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array | None) -> jax.Array:
    update = jnp.matmul(a, b, precision="highest")
    matrix = kernel.astype(jnp.float32).reshape(update.shape) + update
    if magnitude is not None:
        axis = -2 if magnitude.shape[-2] == 1 else -1
        length = jnp.linalg.norm(matrix, axis=axis, keepdims=True)
        matrix = jnp.where(jnp.isnan(magnitude), matrix, matrix * (magnitude / length))
    return matrix.reshape(kernel.shape)


def load_lora(source: str | os.PathLike, config: MMDiTConfig) -> dict[str, Any]:
    """The LoRA tree (`models.lora`) of a file that adapts nothing but a transformer's dense layers; its scale is in the tree.

    Raises ValueError or FileNotFoundError in one sentence: as `read_lora`, or for what can only be merged.
    """
    adapter = read_lora(source, {"transformer": config})
    tree, rest = low_rank(leaves(adapter.updates["transformer"], config), config)
    if rest:
        what = "is a DoRA" if any("magnitude" in pair for pair in rest.values()) else f"adapts {min(rest)}"
        raise ValueError(
            f"{adapter.origin} {what}, which can only be merged into a model: use launch.export --lora, and the model that it makes."
        )
    return tree


# Out of them.
