"""LoRA of the MMDiT <-> `pytorch_lora_weights.safetensors`, the file of diffusers' `load_lora_weights`.

The update is B A x alpha / r in both worlds. A file without metadata means alpha = r, so alpha goes into the header
(`lora_adapter_metadata`, JSON of peft's `LoraConfig` fields under 'transformer.'), where diffusers writes and reads it.
A folder written by peft's `save_pretrained` (`adapter_model.safetensors`, `adapter_config.json`) is read as well.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.models.lora import LORA_TARGETS
from unipic2_jax.models.mmdit import MMDiTConfig
from unipic2_jax.weights import io, mmdit, registry, table
from unipic2_jax.weights.table import Rule

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
PREFIX = "transformer."
PEFT_PREFIXES = ("base_model.model.transformer.", "base_model.model.", PREFIX)


def rules(config: MMDiTConfig) -> tuple[Rule, ...]:
    """The table of the LoRA tree, from that of the network: `X.weight` -> `transformer.X.lora_{A,B}.weight`."""
    adapted = {f"attn/{name}/kernel" for name in LORA_TARGETS}
    table_ = []
    for rule in mmdit.rules(config):
        _, _, inner = rule.path.partition("/")
        if inner in adapted:
            torch, path = rule.torch.removesuffix(".weight"), rule.path.removesuffix("/kernel")
            table_.append(Rule(f"{PREFIX}{torch}.lora_A.weight", f"{path}/a", "linear", rule.layers))
            table_.append(Rule(f"{PREFIX}{torch}.lora_B.weight", f"{path}/b", "linear", rule.layers))
    return tuple(table_)


def metadata(rank: int, alpha: float, kept: Iterable[Rule]) -> dict[str, str]:
    """The header that makes diffusers scale by alpha / rank. Targets are 'attn.X': a bare 'to_q' would take attn2's too."""
    ours = {rule.path.split("/")[-2] for rule in kept}
    targets = sorted(f"attn.{'to_out.0' if name == 'to_out' else name}" for name in ours)
    fields = {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    values = {PREFIX + key: value for key, value in fields.items()}
    return {"format": "pt", METADATA_KEY: json.dumps(values, indent=2, sort_keys=True)}


def save_lora(
    destination: str | os.PathLike, lora: Mapping[str, Any], alpha: float, config: MMDiTConfig, dtype: Any = None
) -> Path:
    """Writes a LoRA tree for `StableDiffusion3Pipeline.load_lora_weights`.

    Args:
      destination: a folder (gets `pytorch_lora_weights.safetensors`) or a `.safetensors` file.
      lora: the tree of `models/lora.py`. alpha: the update is B A x alpha / rank.
      dtype: of the file; None keeps the tree's.
    """
    destination = Path(destination)
    file = destination if destination.suffix == ".safetensors" else destination / FILE_NAME
    present = set(table.flatten(lora))
    kept = tuple(rule for rule in rules(config) if rule.path in present)
    return io.write_file(file, table.to_torch(kept, lora, dtype), metadata(_rank(lora), alpha, kept))


def load_lora(
    source: str | os.PathLike, config: MMDiTConfig, sharding: Any = None, dtype: Any = None
) -> tuple[dict[str, Any], float]:
    """(LoRA tree, alpha) from a file or a folder of diffusers or peft.

    Args:
      config: of the transformer it was made for. sharding, dtype: as in `table.to_flax`.

    Raises ValueError or FileNotFoundError in one sentence: no such file, a layer that this project does not adapt, a
    part of the layers missing, ranks that differ, DoRA.
    """
    adapter = open_lora(source)
    kept, abstract = fit(adapter, config)
    return table.to_flax(kept, adapter, abstract, sharding, dtype), adapter.alpha


class Adapter(Mapping[str, Any]):
    """The tensors of a LoRA file under diffusers' names, with its `rank`, `alpha` and header."""

    def __init__(self, checkpoint: io.Checkpoint, fields: Mapping[str, Any]):
        self.checkpoint, self.metadata = checkpoint, checkpoint.metadata
        self._names = {_diffusers_name(name): name for name in checkpoint}
        ranks = {checkpoint[n].shape[0] for k, n in self._names.items() if k.endswith(".lora_A.weight")}
        if not ranks:
            raise ValueError(f"{checkpoint.origin()} holds no LoRA matrices (*.lora_A.weight); check the file.")
        alphas = {float(fields["lora_alpha"]) if "lora_alpha" in fields else float(max(ranks))}
        alphas |= {float(value) for value in (fields.get("alpha_pattern") or {}).values()}
        if len(ranks) > 1 or len(alphas) > 1:
            raise ValueError(
                f"{checkpoint.origin()} gives its layers different ranks {sorted(ranks)} or alphas {sorted(alphas)}; "
                "only one of each is supported: merge it in PyTorch instead."
            )
        if fields.get("use_dora"):
            raise ValueError(f"{checkpoint.origin()} is a DoRA, which is not supported: merge it in PyTorch instead.")
        self.rank, self.alpha = ranks.pop(), alphas.pop()
        if fields.get("use_rslora"):
            # peft then scales by alpha / sqrt(r); ours by alpha / r.
            self.alpha *= math.sqrt(self.rank)

    def __getitem__(self, name: str) -> io.LazyTensor:
        return self.checkpoint[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def origin(self, name: str | None = None) -> str:
        """The file, for error messages."""
        return str(self.checkpoint.files[0])


def is_lora_file(file: str | os.PathLike) -> bool:
    """Whether a safetensors file, or peft folder, holds LoRA matrices."""
    file = Path(file)
    if file.is_dir():
        return (file / PEFT_CONFIG).is_file() or (file / FILE_NAME).is_file()
    return any(".lora_A." in name for name in io.read_header(file)[0])


def open_lora(source: str | os.PathLike) -> Adapter:
    """A LoRA file, or the folder that holds one. Reads headers only."""
    source, fields = Path(source), {}
    file = source
    if source.is_dir():
        file = next((source / name for name in (FILE_NAME, PEFT_FILE) if (source / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{source} holds neither {FILE_NAME} nor {PEFT_FILE}; check the path.")
    checkpoint = io.Checkpoint(file, [file])
    if raw := checkpoint.metadata.get(METADATA_KEY):
        try:
            fields = {key.removeprefix(PREFIX): value for key, value in json.loads(raw).items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} has an unreadable {METADATA_KEY} in its header ({error}); export it again."
            ) from error
    elif file.name == PEFT_FILE:
        fields = registry.read_json(file.parent / PEFT_CONFIG)
    return Adapter(checkpoint, fields)


def fit(adapter: Adapter, config: MMDiTConfig) -> tuple[tuple[Rule, ...], dict[str, Any]]:
    """(rules of the layers that the file adapts, shapes of their LoRA tree) for a transformer.

    A file may adapt a part of the targets, but each of those in all layers of a stack.
    """
    kept = tuple(rule for rule in rules(config) if any(name in adapter for name, _ in rule.names()))
    known = {rule.path for rule in kept}
    if extra := sorted(set(adapter) - {name for rule in kept for name, _ in rule.names()}):
        every = [name for rule in rules(config) for name, _ in rule.names()]
        raise ValueError(
            f"{adapter.origin()} adapts {extra[0]!r}, which this project does not; it adapts "
            f"attn.{{{','.join(LORA_TARGETS)}}} of the transformer's {config.num_layers} blocks"
            f"{table.nearest(extra[0], every)}."
        )
    shapes = table.flatten(registry.NETWORKS[config.CLASS_NAME].abstract(config))
    abstract = {}
    for path in known:
        *stack, width_in, width_out = shapes[path[:-2] + "/kernel"].shape
        pair = (width_in, adapter.rank) if path.endswith("/a") else (adapter.rank, width_out)
        abstract[path] = jax.ShapeDtypeStruct((*stack, *pair), jnp.float32)
    return kept, table.unflatten({rule.path: abstract[rule.path] for rule in kept})


def _rank(lora: Mapping[str, Any]) -> int:
    ranks = {leaf.shape[-1] for path, leaf in table.flatten(lora).items() if path.endswith("/a")}
    if len(ranks) != 1:
        raise ValueError(f"The LoRA tree has ranks {sorted(ranks)}; it must have one.")
    return ranks.pop()


def _diffusers_name(name: str) -> str:
    for prefix in PEFT_PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return PREFIX + name.replace(".default.weight", ".weight")
