"""The one file that DeepGen's training code writes: everything that is trained, under the names of its attributes.

Original: deepgenteam/deepgen, and deepgenteam/deepgen_rl for the wrappers in its names. The file lacks what is not trained, and a
base has it: autoencoder, schedule, and Qwen2.5-VL, whose LoRA is in the file unmerged. That LoRA is on every linear layer and on the
embedding; beyond the decoder's layers it is nothing (no gradient reaches it, or nothing uses it), and the embedding's is merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from unipic2_jax.core.files import write_json
from unipic2_jax.core.strict import read_object
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.deepgen import names
from unipic2_jax.models.deepgen.network import DecoderLoRAConfig, DeepGenConfig
from unipic2_jax.models.family import FileFormat
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.registry import FAMILIES, network_of, read_network
from unipic2_jax.weights import io, native, table

# What says how a file was, at the top of the folder that it became.
RECORD = "deepgen_file.json"
# Of the embedding's update in peft: A [r, V], B [D, r].
EMBEDDING = "model.language_model.embed_tokens.lora_embedding_{}"
EMBEDDING_LEAF = "embed_tokens/embedding"
# What a vision-language model's folder holds beside its weights.
BESIDE = ("*.json", "*.txt", "*.jinja")

Tensors = Iterable[tuple[str, np.ndarray]]


def owns(tensors: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is one of DeepGen's."""
    return {"meta_queries", "projector_1.weight"} <= names.parts(tensors).get("conditioner", {}).keys()


def unpack(source: io.Checkpoint, base: Path | None, out: Path) -> list[str]:
    """See `FileFormat.unpack`.

    Raises:
      FileNotFoundError, ValueError: one sentence, for a base that lacks a network, and for an update that has no place.
    """
    found = names.parts(source)
    configs = _configs(base)
    base = cast(Path, base)  # `_configs` refuses to go without
    placed = {folder: _placed(configs[folder], stored) for folder, stored in found.items()}
    update = _embedding_update(
        source, found.get("lora", {}), placed.get("lora", {}), cast(DecoderLoRAConfig, configs["lora"])
    )
    for folder, own in placed.items():
        if folder != "vlm":
            _write(out / folder, configs[folder], ((name, source[at][...]) for name, at in own.items()))
    if "vlm" in placed or update is not None:
        stored_there = {name: source[at] for name, at in placed.get("vlm", {}).items()}
        rules = network_of(configs["vlm"]).rules(configs["vlm"])
        held = stored_there or table.canonical(rules, io.open_folder(base / "vlm"))
        _write(out / "vlm", configs["vlm"], _updated(held, rules, update))
        for file in (file for kind in BESIDE for file in (base / "vlm").glob(kind)):
            if not (out / "vlm" / file.name).exists() and not file.name.endswith(".index.json"):
                (out / "vlm" / file.name).symlink_to(file.absolute())
    if update is not None and "vlm" in placed:
        # What stands there is not what was read; that is kept with the rest for the way back.
        placed["vlm"] = {name: at for name, at in placed["vlm"].items() if name != _embedding(configs["vlm"])}
    for item in base.iterdir():
        if not (out / item.name).exists() and not item.name.startswith(".") and item.name != "model_index.json":
            (out / item.name).symlink_to(item.absolute(), target_is_directory=item.is_dir())
    networks = [folder for folder in configs if (out / folder).is_dir()]
    write_json(out / "model_index.json", FAMILIES["deepgen"].model_index(networks))
    write_json(out / RECORD, {"metadata": source.metadata, "names": placed})
    used = {at for own in placed.values() for at in own.values()}
    if spare := sorted(set(source) - used):
        io.write_file(out / native.UNUSED, ((name, source[name][...]) for name in spare))
    return ["the update of the embedding is merged into vlm/"] if update is not None else []


def pack(folder: Path, file: Path) -> None:
    """See `FileFormat.pack`.

    Of a model that comes from no file what is trained is written. The vision-language model stays in its folder, and with it an
    update that was merged into its embedding.
    """
    record = read_object(folder / RECORD) if (folder / RECORD).is_file() else {"names": _usual_names(folder)}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for part, own in record["names"].items():
            stored = io.open_folder(folder / part)
            yield from ((at, stored[name][...]) for name, at in own.items())
        if (folder / native.UNUSED).is_file():
            spare = io.Checkpoint(folder, [folder / native.UNUSED])
            yield from ((name, tensor[...]) for name, tensor in spare.items())

    io.write_file(file, tensors(), record.get("metadata"))


def _configs(base: Path | None) -> dict[str, ModelConfig]:
    """Sizes by folder: the base's, and the released ones of queries, connector and LoRA where it has none."""
    has = lambda folder: base is not None and (base / folder / "config.json").is_file()
    needed = ("transformer", "vae", "vlm")
    if missing := [folder for folder in needed if not has(folder)]:
        raise FileNotFoundError(
            f"A file of DeepGen's needs a --base with {missing[0]}/config.json: a folder of UniPic2-SD3.5M-Kontext's transformer/, "
            "vae/ and scheduler/, and of Qwen2.5-VL-3B as vlm/."
        )
    own = {
        folder: read_network(cast(Path, base) / folder)[1] for folder in (*needed, "conditioner", "lora") if has(folder)
    }
    return {"conditioner": DeepGenConfig(), "lora": DecoderLoRAConfig.of(cast(Qwen2_5_VLConfig, own["vlm"])), **own}


def _placed(config: ModelConfig, stored: Mapping[str, str]) -> dict[str, str]:
    """Name in the network's table -> name in the file, of what the network has."""
    network = network_of(config)
    rules = network.rules(config)
    aliases = dict(pair for rule in rules for pair in rule.alias_names())
    wanted = table.expected_shapes(rules, network.abstract(config))
    renamed = {aliases.get(name, name): at for name, at in stored.items()}
    return {name: at for name, at in renamed.items() if name in wanted}


def _embedding_update(
    source: io.Checkpoint, stored: Mapping[str, str], placed: Mapping[str, str], config: DecoderLoRAConfig
) -> np.ndarray | None:
    """The embedding's update [V, D] float32, if there is one. Beyond it and the decoder's, none may change anything."""
    used = set(placed.values())
    for name, at in stored.items():
        if at not in used and name.endswith("lora_B.weight") and np.asarray(source[at]).any():
            raise ValueError(
                f"{source.origin(at)} holds the update {at!r}, which is not zero; only decoder and embedding may have one."
            )
    sides = [stored[name] for name in map(EMBEDDING.format, "AB") if name in stored]
    if len(sides) < 2:
        return None
    a, b = (np.asarray(source[at]).astype(np.float32) for at in sides)
    return (b @ a).T * np.float32(config.lora_alpha / config.r)


def _embedding(config: ModelConfig) -> str:
    """The embedding's name in the table of a vision-language model."""
    return next(rule.torch for rule in network_of(config).rules(config) if rule.path == EMBEDDING_LEAF)


def _updated(held: Mapping[str, io.LazyTensor], rules: Iterable[table.Rule], update: np.ndarray | None) -> Tensors:
    """A vision-language model's tensors, with the embedding's update added."""
    for rule in rules:
        for name, _ in rule.names():
            if not rule.path:
                continue
            tensor = held[name][...]
            if rule.path == EMBEDDING_LEAF and update is not None:
                tensor = (tensor.astype(np.float32) + update).astype(tensor.dtype)
            yield name, tensor


def _write(folder: Path, config: ModelConfig, tensors: Tensors) -> None:
    """One network in diffusers layout."""
    network = network_of(config)
    io.write_folder(folder, network.stem, tensors)
    write_json(folder / "config.json", network.config_values(config))


def _usual_names(folder: Path) -> dict[str, dict[str, str]]:
    """Folder -> {name in it: name in the file} of what is trained, for a model that comes from no file."""

    def usual(part: str, name: str) -> str:
        if part == "lora":
            return f"lmm.{name.removesuffix('.weight')}{names.ADAPTER}.weight"
        return f"transformer.{name}" if part == "transformer" else name

    parts = [part for part in ("transformer", "conditioner", "lora") if (folder / part).is_dir()]
    return {part: {name: usual(part, name) for name in io.open_folder(folder / part)} for part in parts}


FORMAT = FileFormat(owns, unpack, pack)
