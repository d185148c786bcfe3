"""LoRA files as diffusers and kohya-ss have them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unipic2_jax.models import registry
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.sd3 import single_file
from unipic2_jax.models.sd3.lora_file import FILE_NAME, LAYOUTS, METADATA_KEY, Adapter, Update
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.weights import io, table


def updates(lora: Mapping[str, Any], alpha: float, config: MMDiTConfig, dtype: Any = None) -> dict[str, Update]:
    """A LoRA tree of training, whose update is a b x alpha / rank, by layer."""
    flat, layers = table.flatten(lora), {}
    for rule in registry.NETWORKS[config.CLASS_NAME].rules(config):
        path = rule.path.removesuffix("/kernel")
        if rule.transform != "linear" or f"{path}/a" not in flat:
            continue
        a, b = (np.asarray(flat[f"{path}/{side}"], None if dtype is None else np.dtype(dtype)) for side in "ab")
        for name, index in rule.names():
            down, up = (x.T if index is None else x[index].T for x in (a, b))
            layers[name.removesuffix(".weight")] = Update(down, up, alpha / down.shape[0])
    return layers


def save_lora(
    destination: str | os.PathLike, lora: Mapping[str, Any], alpha: float, config: MMDiTConfig, dtype: Any = None
) -> Path:
    """Writes a LoRA tree of training for `StableDiffusion3Pipeline.load_lora_weights`.

    Args:
      destination: a folder (gets `pytorch_lora_weights.safetensors`) or a `.safetensors` file.
      lora: the tree, whose update is a b x alpha / rank.
      dtype: of the file; None keeps the tree's.
    """
    adapter = Adapter({"transformer": updates(lora, alpha, config, dtype)}, str(destination))
    return write_lora(destination, adapter, {"transformer": config})


def write_lora(
    destination: str | os.PathLike,
    adapter: Adapter,
    configs: Mapping[str, ModelConfig],
    layout: str = "diffusers",
) -> Path:
    """Writes a LoRA file.

    Args:
      destination: a folder or a `.safetensors` file.
      configs: as of `read_lora`.
      layout: 'diffusers' (peft's matrices, with peft's fields in the header), or 'kohya' (the original's names, fused
        query, key and value, an alpha for each layer).

    Raises:
      ValueError: for what the layout has no words for.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"The LoRA layout '{layout}' is unknown; choose one of {', '.join(LAYOUTS)}.")
    destination = Path(destination)
    file = destination if destination.suffix == ".safetensors" else destination / FILE_NAME
    tensors, header = (_diffusers if layout == "diffusers" else _kohya)(adapter, configs)
    contiguous = ((name, np.ascontiguousarray(x).reshape(x.shape)) for name, x in tensors.items())
    return io.write_file(file, contiguous, header)


def _diffusers(adapter: Adapter, configs: Mapping[str, ModelConfig]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    del configs
    tensors: dict[str, np.ndarray] = {}
    values: dict[str, Any] = {}
    for component, layers in adapter.updates.items():
        for layer, update in layers.items():
            if update.magnitude is not None and update.magnitude.shape[0] == 1:
                raise ValueError(
                    f"{adapter.origin} is a DoRA of columns ({component}.{layer}), which peft does not have; merge it."
                )
            up = update.up if update.down.ndim == 2 else update.up[..., None, None]
            tensors[f"{component}.{layer}.lora_A.weight"] = update.down
            tensors[f"{component}.{layer}.lora_B.weight"] = up
            if update.magnitude is not None:
                tensors[f"{component}.{layer}.lora_magnitude_vector"] = update.magnitude[:, 0]
        fields = _peft_fields(layers)
        values |= {f"{component}.{field}": value for field, value in fields.items()}
    return tensors, {"format": "pt", METADATA_KEY: json.dumps(values, indent=2, sort_keys=True)}


def _peft_fields(layers: Mapping[str, Update]) -> dict[str, Any]:
    """`LoraConfig` for updates: one rank and alpha, and what differs from them by layer."""
    number = lambda x: int(x) if float(x).is_integer() else x
    alphas = {layer: number(update.scale * update.rank) for layer, update in layers.items()}
    ranks = {layer: update.rank for layer, update in layers.items()}
    usual = lambda values: max(set(values.values()), key=list(values.values()).count)
    rank, alpha = usual(ranks), usual(alphas)
    # The end of a name that is no other layer's: a bare 'to_q' would take attn2's too.
    targets = {re.sub(r"^transformer_blocks\.\d+\.", "", layer) for layer in layers}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {layer: r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {layer: a for layer, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any(update.magnitude is not None for update in layers.values()),
        "target_modules": sorted(targets),
    }


def _kohya(adapter: Adapter, configs: Mapping[str, ModelConfig]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    names = {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    names["text_encoder_3"] = "lora_te3_"
    tensors: dict[str, np.ndarray] = {}
    for component, layers in adapter.updates.items():
        groups: dict[str, list[tuple[single_file.Piece, Update]]] = {}
        for layer, update in layers.items():
            piece = single_file.PIECES[component](f"{layer}.weight", configs[component])
            groups.setdefault(piece.name.removesuffix(".weight"), []).append((piece, update))
        for stored, members in groups.items():
            update = _fused(sorted(members, key=lambda member: member[0].part), stored, adapter.origin)
            name = names[component] + stored.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = update.down
            tensors[f"{name}.lora_up.weight"] = update.up if update.down.ndim == 2 else update.up[..., None, None]
            tensors[f"{name}.alpha"] = np.array(update.scale * update.rank, np.float32)
            if update.magnitude is not None:
                tensors[f"{name}.dora_scale"] = update.magnitude
    return tensors, {"format": "pt"}


def _fused(members: list[tuple[single_file.Piece, Update]], stored: str, origin: str) -> Update:
    """One update of what is stored together. Parts with matrices of their own are put beside each other: their ranks add up."""
    piece, first = members[0]
    member_updates = [update for _, update in members]
    if piece.parts == 1:
        rows = np.roll(np.arange(first.up.shape[0]), first.up.shape[0] // 2 if piece.swapped else 0)
        length = first.magnitude
        length = length if length is None or length.shape[0] == 1 else length[rows]
        return dataclasses.replace(first, up=first.up[rows], magnitude=length)
    doras = [update.magnitude for update in member_updates]
    if any(length is not None for length in doras) and (
        len(members) < piece.parts or any(length is None or length.shape[0] == 1 for length in doras)
    ):
        raise ValueError(
            f"{origin} is a DoRA of a part of '{stored}', which kohya's layout has no words for; merge it."
        )
    lengths = [length for length in doras if length is not None]
    magnitude = np.concatenate(lengths) if lengths else None
    outputs = first.up.shape[0]
    shared = all(np.array_equal(u.down, first.down) and u.scale == first.scale for u in member_updates)
    rank = first.rank if shared else sum(update.rank for update in member_updates)
    up, start = np.zeros((piece.parts * outputs, rank), first.up.dtype), 0
    for part, update in members:
        block = slice(part.part * outputs, (part.part + 1) * outputs)
        columns = slice(0, rank) if shared else slice(start, start + update.rank)
        up[block, columns] = update.up if shared else update.up * np.asarray(update.scale, update.up.dtype)
        start += update.rank
    down = first.down if shared else np.concatenate([update.down for update in member_updates])
    return Update(down, up, first.scale if shared else 1.0, magnitude)
