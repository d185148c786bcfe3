"""EditReward's own tensors: LoRA of Qwen2.5-VL's decoder in PEFT's layout, and the head.

adapter_model.safetensors, adapter_config.json    for `peft.PeftModel.from_pretrained` on transformers'
                                                  Qwen2_5_VLForConditionalGeneration
head.safetensors                                  'weight' [targets, D] and 'bias' [targets], a PyTorch linear layer
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.core.files import write_json
from unipic2_jax.core.strict import read_object
from unipic2_jax.models.edit_reward.network import LORA_TARGETS, lora_shapes
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.sd3.lora_file import PEFT_CONFIG, PEFT_FILE
from unipic2_jax.parallel.rules import shardings
from unipic2_jax.weights import io, table
from unipic2_jax.weights.table import Rule

HEAD_FILE = "head.safetensors"
HEAD = (Rule("weight", "kernel", "linear"), Rule("bias", "bias"))
PREFIX = "base_model.model.model.language_model.layers.{i}"


def rules(config: Qwen2_5_VLConfig) -> tuple[Rule, ...]:
    """The table of the LoRA tree."""
    layers, out = range(config.num_hidden_layers), []
    for part, names in LORA_TARGETS.items():
        for name in names:
            torch, path = f"{PREFIX}.{part}.{name}", f"vlm/layers/{part}/{name}"
            out += [Rule(f"{torch}.lora_{side}.weight", f"{path}/{side.lower()}", "linear", layers) for side in "AB"]
    return tuple(out)


def abstract_lora(config: Qwen2_5_VLConfig, rank: int) -> dict[str, Any]:
    """Shapes of the LoRA tree."""
    flat = {}
    for part, name, shape_a, shape_b in lora_shapes(config, rank):
        for side, shape in (("a", shape_a), ("b", shape_b)):
            flat[f"vlm/layers/{part}/{name}/{side}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return table.unflatten(flat)


def save_lora(
    folder: str | os.PathLike, lora: Mapping[str, Any], alpha: float, config: Qwen2_5_VLConfig, dtype: Any = None
) -> None:
    """Writes PEFT's two files."""
    folder = Path(folder)
    rank = table.flatten(lora)["vlm/layers/self_attn/q_proj/a"].shape[-1]
    io.write_file(folder / PEFT_FILE, table.to_torch(rules(config), lora, dtype))
    names = "|".join(name for part in LORA_TARGETS.values() for name in part)
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # The vision tower has layers of the same names.
        "target_modules": rf".*language_model\.layers\.\d+\.\w+\.({names})",
        "inference_mode": True,
    }
    write_json(folder / PEFT_CONFIG, values)


def load_lora(
    folder: str | os.PathLike, config: Qwen2_5_VLConfig, mesh: Any = None, dtype: Any = jnp.float32
) -> tuple[dict[str, Any], float]:
    """(LoRA tree, alpha) of a folder.

    Raises:
      ValueError, FileNotFoundError: one sentence about a file that is missing or does not fit the vision-language model.
    """
    checkpoint, fields = _open(folder)
    abstract = abstract_lora(config, fields["r"])
    placed = None if mesh is None else shardings(mesh, abstract)
    return table.to_flax(rules(config), checkpoint, abstract, placed, dtype), float(fields["lora_alpha"])


def check_lora(folder: str | os.PathLike, config: Qwen2_5_VLConfig) -> None:
    """What `load_lora` raises, from the headers alone."""
    checkpoint, fields = _open(folder)
    table.check(rules(config), checkpoint, abstract_lora(config, fields["r"]))


def _open(folder: str | os.PathLike) -> tuple[io.Checkpoint, dict[str, Any]]:
    file = Path(folder) / PEFT_FILE
    fields = read_object(Path(folder) / PEFT_CONFIG)
    if not isinstance(fields.get("r"), int) or not isinstance(fields.get("lora_alpha"), (int, float)):
        raise ValueError(f"{Path(folder) / PEFT_CONFIG} lacks 'r' or 'lora_alpha'; copy it again.")
    if fields.get("use_dora") or fields.get("use_rslora"):
        raise ValueError(f"{file} is a DoRA or an rsLoRA, which is not supported: train a plain LoRA.")
    return io.Checkpoint(file, [file]), fields


def save_head(folder: str | os.PathLike, head: Mapping[str, Any], dtype: Any = None) -> None:
    """Writes the head."""
    io.write_file(Path(folder) / HEAD_FILE, table.to_torch(HEAD, head, dtype))


def abstract_head(config: Qwen2_5_VLConfig, targets: int) -> dict[str, Any]:
    """Shapes of the head."""
    shapes = {"kernel": (config.hidden_size, targets), "bias": (targets,)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def load_head(folder: str | os.PathLike, config: Qwen2_5_VLConfig, targets: int, mesh: Any = None) -> dict[str, Any]:
    """The head, float32; errors as `load_lora`."""
    abstract = abstract_head(config, targets)
    placed = None if mesh is None else shardings(mesh, abstract)
    return table.to_flax(HEAD, io.Checkpoint(folder, [Path(folder) / HEAD_FILE]), abstract, placed, jnp.float32)


def check_head(folder: str | os.PathLike, config: Qwen2_5_VLConfig, targets: int) -> None:
    """What `load_head` raises, from the header alone."""
    table.check(HEAD, io.Checkpoint(folder, [Path(folder) / HEAD_FILE]), abstract_head(config, targets))
