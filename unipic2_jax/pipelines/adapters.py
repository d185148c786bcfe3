"""LoRA files on a model: found, read, applied beside its weights or merged into them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unipic2_jax.core import hub
from unipic2_jax.core.addresses import local
from unipic2_jax.models.bundle import Bundle, find_model
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.lora import joined
from unipic2_jax.models.sd3 import lora_file as lora

HUB_PATTERNS = ("*.safetensors", lora.PEFT_CONFIG)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A LoRA that is asked for: a file, a folder or a hub id, and what its own scale is multiplied by."""

    source: str
    scale: float = 1.0


def parse(texts: Iterable[str]) -> list[Wanted]:
    """'FILE_OR_FOLDER_OR_HUB_ID[:scale]', each; whether it is there, `locate` says.

    Raises:
      ValueError: for a scale that is not finite, or an empty text.
    """
    loras = []
    for text in texts:
        source, colon, last = text.rpartition(":")
        try:
            wanted = Wanted(source, float(last)) if colon else Wanted(text)
        except ValueError:  # a colon in a path
            wanted = Wanted(text)
        if not wanted.source or not math.isfinite(wanted.scale):
            raise ValueError(f"--lora={text!r} is no FILE[:scale]; name a file, a folder or a hub id.")
        loras.append(wanted)
    return loras


def component_configs(bundle: Bundle) -> dict[str, ModelConfig]:
    """Sizes of the networks that a LoRA may adapt, by folder name."""
    modules = {"transformer": bundle.transformer, **bundle.conditioner.modules}
    return {name: module.config for name, module in modules.items() if name in lora.PREFIXES}


def locate(source: str | os.PathLike) -> Path:
    """The LoRA file that a path or a hub id means.

    Raises:
      FileNotFoundError, ValueError: one sentence, when there is none.
    """
    path = Path(local(source))
    if not path.exists() and path.suffix != ".safetensors" and hub.is_id(source):
        path = find_model(source, HUB_PATTERNS)
    return lora.find_file(path)


def located(texts: Iterable[str]) -> list[Wanted]:
    """What `parse` understands, by its files: to be called before minutes of reading a model. Errors are those of both."""
    return [dataclasses.replace(wanted, source=str(locate(wanted.source))) for wanted in parse(texts)]


def read(bundle: Bundle, source: str | os.PathLike) -> lora.Adapter:
    """A LoRA file for a model.

    Raises:
      FileNotFoundError, ValueError: one sentence, see `locate` and `models.sd3.lora_file.read_lora`.
    """
    return lora.read_lora(locate(source), component_configs(bundle))


def applied(bundle: Bundle, loras: Sequence[tuple[lora.Adapter, float]]) -> tuple[Bundle, Any]:
    """A model with several LoRAs, each at a scale.

    Returns:
      The model with what can only be merged in its weights, and the tree of what the transformer applies beside them, or None.
    """
    trees = []
    for adapter, scale in loras:
        for component, layers in adapter.updates.items():
            config = component_configs(bundle)[component]
            tree, rest = lora.low_rank(lora.leaves(layers, config, scale), config)
            trees += [tree] if tree else []
            bundle = _merged(bundle, component, rest) if rest else bundle
    return bundle, joined(trees) if trees else None


def fused(bundle: Bundle, loras: Sequence[tuple[lora.Adapter, float]]) -> tuple[Bundle, set[str]]:
    """A model with several LoRAs in its weights, and the paths of the leaves that they change ('transformer/path/to/leaf')."""
    changed = set()
    for adapter, scale in loras:
        for component, layers in adapter.updates.items():
            leaves = lora.leaves(layers, component_configs(bundle)[component], scale)
            bundle = _merged(bundle, component, leaves)
            group = component if component in bundle.params else f"conditioner/{component}"
            changed |= {f"{group}/{path}/kernel" for path in leaves}
    return bundle, changed


def load_fused(bundle: Bundle, wanted: Iterable[Wanted]) -> tuple[Bundle, set[str]]:
    """`fused` for what was `located`."""
    return fused(bundle, [(read(bundle, one.source), one.scale) for one in wanted])


def _merged(bundle: Bundle, component: str, leaves: Any) -> Bundle:
    params = dict(bundle.params)
    if component in params:
        params[component] = lora.merge(params[component], leaves)
    else:
        merged = lora.merge(params["conditioner"][component], leaves)
        params["conditioner"] = {**params["conditioner"], component: merged}
    return dataclasses.replace(bundle, params=params)
