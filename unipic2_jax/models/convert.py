"""Whole checkpoints from PyTorch to here and back: folders in diffusers layout, single files, LoRA files.

Here, a checkpoint is the same folder with each network's safetensors replaced by an Orbax checkpoint
(`weights/native.py`); everything else (configs, tokenizers, scheduler) is copied as it came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from unipic2_jax.core.errors import closest
from unipic2_jax.core.files import write_json
from unipic2_jax.core.strict import read_object
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models import registry
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.family import FileFormat
from unipic2_jax.models.sd3 import lora_file as lora
from unipic2_jax.models.sd3 import single_file
from unipic2_jax.weights import io, native, table, variants

MODEL_INDEX, SINGLE_FILE = "model_index.json", "single_file.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
OWN = (native.MANIFEST, native.UNUSED, SINGLE_FILE)


def from_torch(src: str | os.PathLike, dst: str | os.PathLike, base: str | os.PathLike | None = None) -> list[str]:
    """Converts a PyTorch checkpoint into a folder of ours.

    Args:
      src: a model folder in diffusers layout, one network's folder, a single-file checkpoint, a file of one network under
        diffusers' names (with `base`), or a LoRA file.
      dst: the folder to make; it must not hold anything yet, and appears only when complete.
      base: a model folder that supplies what a file does not hold: configs, tokenizers, further networks.

    Returns lines that say what was done. Raises FileNotFoundError or ValueError in one sentence.
    """
    src, dst, base = Path(src), Path(dst), None if base is None else Path(base)
    if base is not None and not base.is_dir():
        raise FileNotFoundError(f"There is no folder {base}; --base is a model folder in diffusers layout.")
    make: Callable[[Path, Path, Path | None], list[str]]
    if src.is_file() and (file := _file_of(src)):
        make = functools.partial(_packed_from_torch, file)
    elif src.is_file():
        make = _lora_from_torch if lora.is_lora_file(src) else _single_file_from_torch
    elif not src.is_dir():
        raise FileNotFoundError(f"There is no file or folder {src}; check the path.")
    elif native.is_native(src) or any(native.is_native(sub) for sub in _folders(src)):
        raise ValueError(f"{src} is already converted; convert.to_torch goes back.")
    else:
        make = _lora_from_torch if not _is_model(src) and lora.is_lora_file(src) else _folder_from_torch
    with _whole_folder(dst) as out:
        return make(src, out, base)


def to_torch(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    layout: str | None = None,
    max_shard_bytes: int = io.MAX_SHARD_BYTES,
) -> list[str]:
    """Converts a folder of ours (or one in diffusers layout) into PyTorch's files: the original names, dtypes and bits.

    Args:
      dst: a folder (diffusers layout) or a `.safetensors` file (single file; for LoRA either will do).
      layout: 'diffusers' or 'single_file'; None reads it from `dst`.
      max_shard_bytes: of each file of a folder.

    Returns lines that say what was done. Raises FileNotFoundError or ValueError in one sentence.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_dir():
        raise FileNotFoundError(f"There is no folder {src}; check the path.")
    if not _is_model(src) and lora.is_lora_file(src):
        return _lora_to_torch(src, dst)
    is_file = dst.suffix == ".safetensors"
    layout = layout or ("single_file" if is_file else "diffusers")
    if layout not in ("diffusers", "single_file"):
        raise ValueError(f"The layout {layout!r} is unknown; choose 'diffusers' or 'single_file'.")
    if (layout == "single_file") != is_file:
        raise ValueError(f"The layout {layout} needs --dst to be a {'.safetensors file' if not is_file else 'folder'}.")
    if is_file and (file := registry.family_of_folder(src).file):
        return _packed_to_torch(file, src, dst)
    if is_file:
        return _single_file_to_torch(src, dst)
    with _whole_folder(dst) as out:
        return _folder_to_torch(src, out, max_shard_bytes)


def _folder_to_torch(src: Path, out: Path, max_shard_bytes: int = io.MAX_SHARD_BYTES) -> list[str]:
    if (src / "config.json").is_file():
        return [_component_to_torch(src, out, max_shard_bytes)]
    parts, _ = _components(src)
    _copy_plain(src, out)
    return [_component_to_torch(src / part, out / part, max_shard_bytes) for part in parts]


def _folder_from_torch(src: Path, out: Path, base: Path | None) -> list[str]:
    if (src / "config.json").is_file():
        return [_component_from_torch(src, out)]
    parts, left = _components(src)
    # Everything is checked before the first tensor is read: a full model takes minutes.
    for part in parts:
        network, config = registry.read_network(src / part)
        table.check(network.rules(config), variants.open_folder(src / part), network.abstract(config))
    _copy_plain(src, out)
    lines = [_component_from_torch(src / part, out / part) for part in parts]
    return lines + [f"{part}: left out, {MODEL_INDEX} does not name it" for part in left]


def _component_from_torch(src: Path, out: Path) -> str:
    return _network_from_torch(variants.open_folder(src), _stem(src), src, out)


def _stem(folder: Path) -> str:
    """The stem of the weights in a folder that has been opened, and so has some."""
    return cast(str, io.weight_stem(folder))


def _network_from_torch(source: variants.Variant, stem: str, configured: Path, out: Path) -> str:
    """Writes one network from its tensors; `configured` is the folder with its config.json."""
    network, config = registry.read_network(configured)
    native.write(out, network.rules(config), source, network.abstract(config), stem)
    _copy_files(configured, out)
    line = _line(configured.name, config, len(source), sum(map(checkpoint_bytes, source.values())))
    return "; ".join([line, *source.notes])


def _component_to_torch(src: Path, out: Path, max_shard_bytes: int) -> str:
    network, config = registry.read_network(src)
    rules = network.rules(config)
    if native.is_native(src):
        native.check_component(src, rules, network.abstract(config))
        manifest, tensors = native.tensors(src, rules)
        stem, metadata = manifest.stem, manifest.metadata
    else:
        checkpoint = variants.open_folder(src)
        table.check(rules, checkpoint, network.abstract(config))
        stem, metadata = _stem(src), checkpoint.metadata
        tensors = ((name, tensor[...]) for name, tensor in checkpoint.items())
    files = io.write_folder(out, stem, tensors, max_shard_bytes, metadata)
    _copy_files(src, out)
    return _line(src.name, config, len(io.open_folder(out, stem)), sum(f.stat().st_size for f in files))


def _line(name: str, config: ModelConfig, count: int, nbytes: int) -> str:
    return f"{name}: {config.CLASS_NAME}, {count} tensors, {nbytes / 1e6:.1f} MB"


def _folders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _is_model(folder: Path) -> bool:
    """Whether a folder says that it is a model's, or a network's: what it holds beside is no LoRA by itself."""
    return (folder / MODEL_INDEX).is_file() or (folder / "config.json").is_file()


def _has_weights(folder: Path) -> bool:
    return native.is_native(folder) or any(file.suffix in WEIGHTS for file in folder.iterdir())


def _components(folder: Path) -> tuple[list[str], list[str]]:
    """(networks of a model folder, folders with weights that its model_index.json does not name)."""
    holding = [sub.name for sub in _folders(folder) if _has_weights(sub)]
    if not (folder / MODEL_INDEX).is_file():
        if not holding:
            raise FileNotFoundError(
                f"{folder} holds no model: neither {MODEL_INDEX} nor config.json nor folders with weights; check the path."
            )
        return holding, []
    index = read_object(folder / MODEL_INDEX)
    named = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1] is not None}
    networks = [name for name, kind in named.items() if name in holding or kind in registry.NETWORKS]
    for name in networks:
        if name not in holding:
            what = "weights in the folder" if (folder / name).is_dir() else "folder"
            raise FileNotFoundError(f"{folder} lacks the {what} {name}/ that {MODEL_INDEX} names; copy it there.")
    return networks, [name for name in holding if name not in networks]


def _is_plain(file: Path) -> bool:
    is_index = ".safetensors.index." in file.name or ".bin.index." in file.name
    return file.suffix not in WEIGHTS and not is_index and file.name not in OWN and not file.name.startswith(".")


def _copy_files(src: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(src.iterdir()):
        if file.is_file() and _is_plain(file):
            shutil.copyfile(file, out / file.name)


def _copy_plain(src: Path, out: Path) -> None:
    """All that is no network: the files at the top, and the folders without weights (tokenizers, scheduler)."""
    _copy_files(src, out)
    for sub in _folders(src):
        if not _has_weights(sub):
            ignore = lambda where, names: [n for n in names if not (Path(where, n).is_dir() or _is_plain(Path(n)))]
            shutil.copytree(sub, out / sub.name, ignore=ignore, dirs_exist_ok=True)


@contextlib.contextmanager
def _whole_folder(dst: Path) -> Iterator[Path]:
    """A folder beside `dst` that takes its name when the body is done, and vanishes when it fails."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} already holds something; choose a new folder, or remove it first.")
    dst = dst.absolute()
    dst.parent.mkdir(parents=True, exist_ok=True)
    out = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.parent))
    try:
        yield out
        out.chmod(0o755)
        out.replace(dst)
    finally:
        shutil.rmtree(out, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """`single_file.json`: how the file was, for the way back. `metadata` is its header's, `prefixes` those of names."""

    metadata: dict[str, str]
    prefixes: dict[str, str]
    filled: list[str]


def _single_file_from_torch(src: Path, out: Path, base: Path | None) -> list[str]:
    checkpoint = variants.plain(io.Checkpoint(src, [src]))
    prefixes = single_file.prefixes(checkpoint)
    if "transformer" not in prefixes and "vae" not in prefixes:
        if base is not None and (part := _network_of_file(src, base)):
            return _network_file_from_torch(src, part, out, base)
        near = closest(single_file.PREFIXES["transformer"][0] + single_file.PROBES["transformer"], checkpoint)
        raise ValueError(f"{src} is neither a single-file SD3.5 checkpoint nor a LoRA file{near}.")
    configs, networks, wanted = {}, {}, {}
    for part, prefix in prefixes.items():
        try:
            derived = single_file.read_config(part, checkpoint)
        except KeyError as error:
            raise ValueError(
                f"{src} lacks the tensor {prefix + error.args[0]!r}; copy or download it again."
            ) from error
        networks[part] = registry.NETWORKS[derived.CLASS_NAME]
        configs[part] = derived if base is None else registry.read_network(base / part)[1]
        rules = networks[part].rules(configs[part])
        names = list(table.expected_shapes(rules, networks[part].abstract(configs[part])))
        wanted[part] = names + [n for n in sorted(table.unused_names(rules)) if prefix + n in checkpoint]
    views, unused, filled = single_file.split(checkpoint, wanted, configs)
    for part, config in configs.items():
        table.check(networks[part].rules(config), views[part], networks[part].abstract(config))
    if base is None:
        _write_configs(out, configs)
    else:
        _copy_plain(base, out)
    lines = []
    for part, config in configs.items():
        stem = networks[part].stem
        native.write(out / part, networks[part].rules(config), views[part], networks[part].abstract(config), stem)
        if base is not None:
            _copy_files(base / part, out / part)
        lines.append(_line(part, config, len(views[part]), sum(checkpoint_bytes(v) for v in views[part].values())))
    if base is not None:
        others = [part for part in _components(base)[0] if part not in configs]
        lines += [_component_from_torch(base / part, out / part) + f", from {base}" for part in others]
    else:
        lines.append("sizes were read from the tensors' shapes; tokenizers are missing: give --base to add them")
    lines += checkpoint.notes
    if unused:
        io.write_file(out / native.UNUSED, ((name, checkpoint[name][...]) for name in unused))
    write_json(out / SINGLE_FILE, dataclasses.asdict(_Origin(checkpoint.metadata, prefixes, filled)))
    return lines


def _file_of(src: Path) -> FileFormat | None:
    """The layout of a file, where it is a family's own."""
    if src.suffix != ".safetensors":
        return None
    names, formats = io.read_header(src)[0], [family.file for family in registry.FAMILIES.values()]
    return next((file for file in formats if file is not None and file.owns(names)), None)


def _packed_from_torch(file: FileFormat, src: Path, out: Path, base: Path | None) -> list[str]:
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=out.parent) as scratch:
        notes = file.unpack(io.Checkpoint(src, [src]), base, Path(scratch))
        lines = _folder_from_torch(Path(scratch), out, None)
        if (spare := Path(scratch) / native.UNUSED).is_file():
            shutil.copyfile(spare, out / native.UNUSED)
    return lines + notes


def _packed_to_torch(file: FileFormat, src: Path, dst: Path) -> list[str]:
    dst = dst.absolute()
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as scratch:
        _folder_to_torch(src, Path(scratch))
        if (src / native.UNUSED).is_file():
            shutil.copyfile(src / native.UNUSED, Path(scratch) / native.UNUSED)
        file.pack(Path(scratch), dst)
    return [f"{dst.name}: {len(io.read_header(dst)[0])} tensors, {dst.stat().st_size / 1e6:.1f} MB"]


def _network_of_file(src: Path, base: Path) -> str | None:
    """Which network of a model folder (or '.', the folder's own) has most of a file's tensors under diffusers' names."""
    held = set(variants.plain(io.Checkpoint(src, [src]), (*variants.OUTER, *variants.OWNERS)))
    for part in ["."] if (base / "config.json").is_file() else _components(base)[0]:
        network, config = registry.read_network(base / part)
        if 2 * len(held & table.expected_shapes(network.rules(config), network.abstract(config)).keys()) > len(held):
            return part
    return None


def _network_file_from_torch(src: Path, part: str, out: Path, base: Path) -> list[str]:
    """A file of one network under diffusers' names takes the place of that network of `base`."""
    source = variants.plain(io.Checkpoint(src, [src]), (*variants.OUTER, *variants.OWNERS))
    stem = io.weight_stem(base / part) or io.DIFFUSERS_STEM
    lines = [_network_from_torch(source, stem, (base / part).resolve(), out / part)]
    if part == ".":
        return lines
    _copy_plain(base, out)
    others = [other for other in _components(base)[0] if other != part]
    return lines + [_component_from_torch(base / other, out / other) + f", from {base}" for other in others]


def checkpoint_bytes(tensor: Any) -> int:
    """Bytes of a lazy tensor."""
    count = 1
    for n in tensor.shape:
        count *= n
    return count * tensor.dtype.itemsize


def _write_configs(out: Path, configs: dict[str, ModelConfig]) -> None:
    """What a folder in diffusers layout says about its networks."""
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    for part, config in configs.items():
        network = registry.network_of(config)
        write_json(out / part / "config.json", network.config_values(config))
        index[part] = [network.library, config.CLASS_NAME]
    if "transformer" in configs:
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        FlowMatchConfig().save(out / "scheduler")
    write_json(out / MODEL_INDEX, index)


def _single_file_to_torch(src: Path, dst: Path) -> list[str]:
    parts, _ = _components(src)
    origin = None
    if (src / SINGLE_FILE).is_file():
        values = read_object(src / SINGLE_FILE)
        origin = _Origin(values["metadata"], values["prefixes"], values["filled"])
        parts = [part for part in origin.prefixes if part in parts]
    if foreign := [part for part in parts if part not in single_file.PREFIXES]:
        raise ValueError(f"The single-file layout has no place for {foreign[0]}/; use the layout diffusers.")
    dst = dst.absolute()
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as scratch:
        # The file interleaves what our leaves stack, so networks pass through safetensors that are read at random.
        sources, configs = {}, {}
        for part in parts:
            _component_to_torch(src / part, Path(scratch) / part, io.MAX_SHARD_BYTES)
            sources[part], (_, configs[part]) = io.open_folder(Path(scratch) / part), registry.read_network(src / part)

        def tensors() -> Iterator[tuple[str, Any]]:
            if origin is None:
                yield from single_file.join(sources, configs)
                return
            yield from single_file.join(sources, configs, origin.prefixes, origin.filled)
            if (src / native.UNUSED).is_file():
                yield from ((n, t[...]) for n, t in io.Checkpoint(src, [src / native.UNUSED]).items())

        io.write_file(dst, tensors(), None if origin is None else origin.metadata)
    return [f"{dst.name}: {', '.join(parts)}, {len(io.read_header(dst)[0])} tensors, {dst.stat().st_size / 1e6:.1f} MB"]


def _lora_from_torch(src: Path, out: Path, base: Path | None) -> list[str]:
    """A LoRA file is used here as it is: it is checked against its model and copied."""
    if base is None:
        raise ValueError(f"{src} is a LoRA file; name the model folder it was made for with --base.")
    parts = {"transformer": base} if (base / "config.json").is_file() else {p: base / p for p in lora.PREFIXES}
    configs = {p: registry.read_network(at)[1] for p, at in parts.items() if (at / "config.json").is_file()}
    adapter, file = lora.read_lora(src, configs), lora.find_file(src)
    for name in (file.name, *([lora.PEFT_CONFIG] if file.name == lora.PEFT_FILE else [])):
        shutil.copyfile(file.parent / name, out / name)
    return [f"LoRA: {adapter}"]


def _lora_to_torch(src: Path, dst: Path) -> list[str]:
    source = lora.find_file(src)
    file = dst if dst.suffix == ".safetensors" else dst / source.name
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, file)
    return [f"{file}: {len(io.read_header(file)[0])} tensors"]
