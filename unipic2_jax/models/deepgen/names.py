"""The tables of DeepGen's own networks, and the parts of the one file that its training code writes.

Original: the attributes of `Qwen2p5VLStableDiffusion3HF` (deepgenteam/deepgen), and peft's names of an adapter in a model.
"""

from __future__ import annotations

from collections.abc import Iterable

from unipic2_jax.models.deepgen.network import DecoderLoRAConfig, DeepGenConfig
from unipic2_jax.models.metaquery import names as metaquery
from unipic2_jax.weights.table import Rule

# Of a name in the training code's file: where it starts -> the folder of the network. What is first found counts.
PARTS = {
    "transformer.": "transformer",
    "vae.": "vae",
    "connector.": "conditioner",
    "projector_": "conditioner",
    "meta_queries": "conditioner",
    "lmm.": "vlm",
}
# What wraps a whole file's names: DeepSpeed's and Lightning's.
WRAPPERS = ("module.", "model.")
# peft's name of the one adapter that there is: at the end of an embedding's, before 'weight' in others.
ADAPTER = ".default"


def rules(config: DeepGenConfig) -> tuple[Rule, ...]:
    """Every tensor of the folder `conditioner/`: MetaQuery's names, with a wider projector_1."""
    return metaquery.rules(config)


def lora_rules(config: DecoderLoRAConfig) -> tuple[Rule, ...]:
    """Every tensor of the folder `lora/`, as peft names an update of transformers' Qwen2.5-VL; layers are stacked."""
    layers = range(config.num_hidden_layers)
    out = []
    for part, name, *_ in config.matrices():
        for side in ("a", "b"):
            torch = f"layers.{{i}}.{part}.{name}.lora_{side.upper()}.weight"
            # The second is what a file has that was made with transformers before 4.52.
            aliases = (f"model.{torch}",)
            rule = Rule(f"model.language_model.{torch}", f"layers/{part}/{name}/{side}", "linear", layers, aliases)
            out.append(rule)
    return tuple(out)


def place(name: str) -> tuple[str, str] | None:
    """(folder, name in that folder's file) of a tensor in the training code's file; None: it is none of the model's.

    A LoRA is a folder of its own. The moving average that a file may hold beside the model ('ema.') is none of its parts.
    """
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    folder = next((folder for start, folder in PARTS.items() if name.startswith(start)), None)
    if folder is None:
        return None
    if folder != "conditioner":
        name = name.split(".", 1)[1]
    if folder == "vlm" and ".lora_" in name:
        return "lora", name.removesuffix(ADAPTER).replace(f"{ADAPTER}.", ".")
    # peft keeps the weight that it adapts inside its own layer.
    return folder, name.replace(".base_layer.", ".")


def parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Folder -> {name in its file: name in the training code's file}, of everything that has a place."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if (where := place(name)) is not None:
            found.setdefault(where[0], {})[where[1]] = name
    return found
