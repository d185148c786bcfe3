"""The LoRA of a stage: its fields, what it starts from, and how it comes into a transformer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from unipic2_jax.core.errors import ConfigError
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.lora import merge_lora, pairs, scaled
from unipic2_jax.models.registry import backbone_of
from unipic2_jax.models.sd3.lora_file import find_file, load_lora
from unipic2_jax.models.sd3.lora_writing import save_lora
from unipic2_jax.optim.optimizer import merge_params
from unipic2_jax.parallel.processes import is_main, tree_to_host


def lora_fields(rank: int) -> ConfigDict:
    """The fields of `lora` in a stage; `lora=None` is short for rank 0."""
    return ConfigDict(
        {
            "rank": rank,  # 0: no LoRA; the parameters themselves are trained
            "alpha": 64.0,  # the update is scaled by alpha / rank
            "targets": (),  # names of layers as in peft, or regexes, see models.sd3.lora.is_target; empty: the model's own
            "init": "",  # a LoRA file to start from, or the folder of one; empty: from an update that changes nothing
        }
    )


def check_lora(config: ConfigDict) -> None:
    """Raises a ConfigError for fields that cannot work, or a FileNotFoundError."""
    if config.rank < 0:
        raise ConfigError(f"lora.rank is {config.rank}; it must be at least 1, or 0 to train without a LoRA.")
    if not math.isfinite(config.alpha) or config.alpha <= 0:
        raise ConfigError(f"lora.alpha is {config.alpha}; it must be above 0.")
    if config.init and not config.rank:
        raise ConfigError("lora.init names a LoRA file, and lora.rank is 0; give a rank.")
    if config.init:
        find_file(config.init)


def scale_of(config: ConfigDict) -> float:
    """What an update a b is multiplied by."""
    return config.alpha / config.rank


def new_lora(config: ConfigDict, key: jax.Array, params: Any, transformer: ModelConfig) -> dict[str, Any]:
    """The tree that a stage starts from, float32: one that changes nothing yet, or the update of the file `init`.

    Ranks that the file does not fill begin as those of a new LoRA.

    Args:
      params: of the transformer; only shapes are used.

    Raises:
      ConfigError: for targets that the transformer does not have, or a file that the fields have no room for.
    """
    backbone = backbone_of(transformer)
    try:
        tree = backbone.init_lora(key, params, config.rank, targets=config.targets or backbone.lora_targets)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    if not config.init:
        return tree
    flat = traverse_util.flatten_dict(tree)
    for path, pair in pairs(load_lora(config.init, transformer)).items():
        rank, name = pair["a"].shape[-1], ".".join(path)
        if (*path, "a") not in flat:
            raise ConfigError(f"lora.init {config.init} adapts {name}, which lora.targets leaves out; add it there.")
        if rank > config.rank:
            raise ConfigError(
                f"lora.init {config.init} has rank {rank} and lora.rank is {config.rank}; make it {rank}."
            )
        a, b = (jnp.asarray(pair[side]) for side in "ab")
        flat[*path, "a"] = flat[*path, "a"].at[..., :rank].set(a / scale_of(config))
        flat[*path, "b"] = flat[*path, "b"].at[..., :rank, :].set(b)
    return traverse_util.unflatten_dict(flat)


def export_lora(folder: Path, lora: Any, alpha: float, transformer: ModelConfig) -> None:
    """Writes a stage's LoRA, by one process, into the file that diffusers' `load_lora_weights` reads."""
    lora = tree_to_host(lora)
    if is_main():
        save_lora(folder, lora, alpha, transformer)


def merged(params: Any, lora: Any, scale: float, dtype: Any) -> dict[str, Any]:
    """The transformer's parameters with the update in them. Kernels that it changes are in `dtype`, which rounds nothing away; all
    other leaves are the same objects."""
    flat = traverse_util.flatten_dict(params)
    kernels = traverse_util.unflatten_dict({(*path, "kernel"): flat[*path, "kernel"] for path in pairs(lora)})
    merge = jax.jit(lambda tree, lora: merge_lora(tree, scaled(lora, scale), dtype))
    return merge_params(merge(kernels, lora), params)
