"""A whole model: its networks, tokenizers, schedule and parameters, and its folder in diffusers layout."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from unipic2_jax.core import hub
from unipic2_jax.core.addresses import fetched, is_address, local
from unipic2_jax.core.errors import ConfigError, nearest
from unipic2_jax.core.fields import check_fields, hints
from unipic2_jax.core.files import write_json
from unipic2_jax.core.strict import read_object
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.flow.seeds import folded
from unipic2_jax.models.conditioner import Conditioner
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.family import Backbone, Family, ModelSizes
from unipic2_jax.models.model import Start
from unipic2_jax.models.registry import (
    FAMILIES,
    NETWORKS,
    backbone_of,
    class_name,
    family_of,
    family_of_folder,
    find_sizes,
    network_of,
)
from unipic2_jax.models.sd3.vae import AutoencoderKL
from unipic2_jax.parallel.rules import shardings
from unipic2_jax.weights import io, native, table
from unipic2_jax.weights.precision import Precision, as_precision, check_dtype

# What diffusers does not know about a model; it leaves files of other names alone.
EXTRAS_FILE = "unipic2.json"
# The published scripts make pictures of this edge, and resize an edit's longer edge to it.
DEFAULT_PIXELS = 512
FAST_COMPILE = {"xla_backend_optimization_level": 0}
# Weights come as safetensors only: nothing that is downloaded is ever executed.
FILES = ("json", "txt", "jinja", "safetensors")
VLM_PATTERNS = [f"*.{kind}" for kind in FILES]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """Modules, parameters and schedule of one model.

    Attributes:
      params: {'transformer': ..., 'vae': ..., 'conditioner': {'text_encoder': ..., ...}}, the conditioner's by folder.
      files: where the networks were read from, by folder name; those that are not in it are new.

    Raises:
      ValueError: when the networks do not fit each other.
    """

    transformer: nn.Module
    vae: AutoencoderKL
    conditioner: Conditioner
    scheduler: FlowMatchConfig
    params: dict[str, Any]
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.transformer.config
        for what, ours, theirs in (
            ("joint_attention_dim", config.joint_attention_dim, self.conditioner.joint_attention_dim),
            ("pooled_projection_dim", config.pooled_projection_dim, self.conditioner.pooled_dim),
            ("in_channels", config.in_channels, self.vae.config.latent_channels),
        ):
            if ours != theirs:
                raise ValueError(
                    f"The transformer's {what} is {ours} but the conditioner or the VAE gives {theirs}; "
                    "these folders are from different models."
                )

    @classmethod
    def start(cls, start: Start, mesh: Mesh | None = None, precision: Precision | None = None) -> Bundle:
        """The model in the folder `start.init`, or a new one of the sizes `start.model`; see `models.model.Model`."""
        if start.init is not None:
            bundle = load_bundle(start.init, precision, mesh, start.vlm)
        else:
            bundle = init_bundle(
                start.model,
                start.seed,
                mesh=mesh,
                dtype=precision,
                parts=start.parts,
                zero_projectors=start.zero_projectors,
            )
        conditioner: Any = bundle.conditioner
        known = conditioner.SETTINGS
        if unknown := [name for name in start.settings if name not in known]:
            raise ConfigError(
                f"config.settings.{unknown[0]} is no setting of this model's conditioner" + nearest(unknown[0], known)
            )
        return bundle.replace(
            transformer=bundle.transformer.clone(attention_implementation=start.attention),
            conditioner=dataclasses.replace(conditioner, **start.settings),
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def save(
        self,
        folder: str | os.PathLike,
        dtype: Any = None,
        changed: Collection[str] | None = None,
        with_vlm: bool = True,
    ) -> Path:
        """`save_bundle`."""
        return save_bundle(self, folder, dtype, with_vlm, changed)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by folder."""
        return {"transformer": self.transformer, "vae": self.vae, **self.conditioner.modules}

    @property
    def family(self) -> Family:
        """The family that it is of."""
        return family_of({name: module.config for name, module in self.modules.items()})

    @property
    def backbone(self) -> Backbone:
        """What there is to know about its transformer."""
        return backbone_of(self.transformer.config)

    @property
    def vae_scale(self) -> int:
        """Image pixels along the edge of a latent pixel."""
        return self.vae.config.downsampling

    @property
    def patch_pixels(self) -> int:
        """Image pixels along the edge of a token; every edge of a picture is a multiple of it."""
        return self.vae_scale * self.transformer.config.patch_size

    @property
    def default_size(self) -> int:
        """Edge in pixels of a picture made without height and width, for an edit its longer edge.

        512, as in the published scripts, or the transformer's `sample_size` where that is smaller. diffusers takes
        `sample_size`, which is 1024 pixels for SD3.5-Medium; a Kontext model has the same configuration.
        """
        return min(DEFAULT_PIXELS, self.transformer.config.sample_size * self.vae_scale)

    @property
    def largest_size(self) -> int:
        """The longest edge in pixels that the position table covers."""
        return self.transformer.config.pos_embed_max_size * self.patch_pixels


def for_training(bundle: Bundle, remat: str = "full") -> Bundle:
    """The same networks for taking gradients: they keep what the policy `remat` says for the backward pass."""

    def with_changes(module: Any) -> Any:
        return module.clone(remat=remat) if isinstance(module, nn.Module) and hasattr(module, "remat") else module

    def fields(holder: Any) -> Any:
        if not dataclasses.is_dataclass(holder) or isinstance(holder, type):
            return holder
        values = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder) if field.init}
        return dataclasses.replace(holder, **{name: with_changes(value) for name, value in values.items()})

    return dataclasses.replace(fields(bundle), conditioner=fields(bundle.conditioner))


def init_params(transformer: nn.Module, vae: AutoencoderKL, conditioner: Conditioner, key: jax.Array) -> dict[str, Any]:
    """Random parameters of all networks: the tree of `Bundle.params`."""
    keys = jax.random.split(key, 3)
    return {
        "transformer": network_of(transformer.config).init(transformer, keys[0]),
        "vae": network_of(vae.config).init(vae, keys[1]),
        "conditioner": conditioner.init(keys[2]),
    }


def init_bundle(
    sizes: ModelSizes | str,
    seed: int | jax.Array = 0,
    *,
    tokenizers: Mapping[str, Any] | str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    parts: Mapping[str, str | os.PathLike] | None = None,
    zero_projectors: bool = True,
) -> Bundle:
    """A model with random weights, or one put together: networks of other models, and random weights for the rest.

    Args:
      sizes: the networks' sizes, or the name of some (`models.registry.SIZES`).
      seed: a number or a PRNG key.
      tokenizers: as the family's conditioner takes them, or a folder that holds them (`tokenizer/` ..., `vlm/`). None takes those
        that belong to the sizes, or the vision-language model's own where that is one of the parts.
      mesh: parameters are on it as `parallel.rules` says; None: the default device.
      dtype: of parameters and arithmetic, float32 by default; or a `Precision`, and all networks are held as frozen ones.
      parts: networks that are read, by folder name: 'transformer', 'vae', 'vlm' (with its tokenizer) ... -> the folder of
        that network, whose config.json overrules `sizes`.
      zero_projectors: see `models.metaquery.connector.MetaQuery`.

    Raises:
      FileNotFoundError: a part is missing.
      ValueError: when the size is unknown, or tokenizers or parts do not fit.
    """
    sizes = find_sizes(sizes) if isinstance(sizes, str) else sizes
    family = FAMILIES[sizes.family]
    if nowhere := [name for name, folder in (parts or {}).items() if not os.fspath(folder)]:
        raise ValueError(
            f"The part '{nowhere[0]}' of the model has no folder; name one, as in --config.parts.{nowhere[0]}=DIR."
        )
    folders = {name: Path(local(folder)) for name, folder in (parts or {}).items()}
    if unknown := [name for name in folders if name not in sizes.networks]:
        raise ValueError(f"A model of this size has no part {unknown[0]!r}; it has {', '.join(sizes.networks)}.")
    if missing := [folder for folder in folders.values() if not (folder / "config.json").is_file()]:
        raise FileNotFoundError(f"The part {missing[0]} has no config.json; name the folder of one network.")
    configs = {**sizes.networks, **read_configs(folders)}
    if isinstance(tokenizers, (str, os.PathLike)):
        tokenizers = family.load_tokenizers(Path(tokenizers), sizes.networks, {})
    elif tokenizers is None and family.reader in folders:
        tokenizers = family.load_tokenizers(None, configs, folders)
    elif tokenizers is None and sizes.tokenizers is not None:
        tokenizers = sizes.tokenizers(sizes.networks)
    elif tokenizers is None:
        raise ValueError(
            "A new model of this size has no tokenizers of its own; start from a model folder (init), "
            + (f"or name the folder of its '{family.reader}' among the parts." if family.reader else "which has some.")
        )
    precision = as_precision(dtype)
    modules = make_modules(configs, tokenizers, sizes.settings, precision)
    if not zero_projectors:
        transformer, vae, conditioner = modules
        if (connector := getattr(conditioner, "connector", None)) is None:
            raise ValueError("A model with text encoders has no projectors; leave zero_projectors as it is.")
        connector = connector.clone(zero_projectors=False)
        modules = (transformer, vae, dataclasses.replace(conditioner, connector=connector))
    key = jax.random.key(folded(seed)) if isinstance(seed, (int, np.integer)) else seed

    def fresh(key: jax.Array) -> dict[str, Any]:
        made = _by_folder(precision.hold(init_params(*modules, key)))
        return {name: tree for name, tree in made.items() if name not in folders}

    loaded = _load_folders(folders, configs, modules, mesh, precision)
    placed = None if mesh is None else shardings(mesh, jax.eval_shape(fresh, key))
    # It runs once, so compiling fast matters and running fast does not.
    made = jax.jit(fresh, out_shardings=placed, compiler_options=FAST_COMPILE)(key)
    return Bundle(*modules, FlowMatchConfig(shift=sizes.shift), _by_group({**made, **loaded}), folders)


def load_bundle(
    source: str | os.PathLike,
    dtype: Any = None,
    mesh: Mesh | None = None,
    vlm: str | os.PathLike | None = None,
) -> Bundle:
    """Reads a model folder in diffusers layout, with safetensors or with what `convert.from_torch` writes.

    Of which family it is, is what `models.registry.family_of_folder` says.

    Args:
      source: the folder, or the id of a model on the Hugging Face hub ('owner/name'), of which only safetensors, JSON
        and text files are fetched.
      dtype: of parameters and arithmetic: float32 (default), bfloat16 or float16, whatever the files hold; or a `Precision`,
        and all networks are held as frozen ones.
      mesh: parameters are on it as `parallel.rules` says; None: the default device.
      vlm: where a MetaQuery model's vision-language model is, folder or hub id; None: `vlm/` in the model folder.

    Raises:
      FileNotFoundError: the folder or a part of it is missing.
      ValueError: a file is damaged, or a tensor is missing, extra or of another shape. Both come before any weight is
        read.
    """
    folder = find_model(source)
    precision = as_precision(dtype)
    family = family_of_folder(folder)
    folders = _component_folders(folder, family, vlm)
    configs = read_configs(folders)
    scheduler = FlowMatchConfig.load(folder / "scheduler")
    settings = read_object(folder / EXTRAS_FILE) if (folder / EXTRAS_FILE).is_file() else {}
    _check_settings(family.conditioner, settings, folder / EXTRAS_FILE)
    modules = make_modules(configs, family.load_tokenizers(folder, configs, folders), settings, precision)
    loaded = _load_folders(folders, configs, modules, mesh, precision)
    return Bundle(*modules, scheduler, _by_group(loaded), folders)


def _check_settings(conditioner: type[Conditioner], settings: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError in one sentence for a setting that this class has not, or of another type."""
    if unknown := [name for name in settings if name not in conditioner.SETTINGS]:
        raise ValueError(f"{file} has the field {unknown[0]!r}; a model of this kind knows {conditioner.SETTINGS}.")
    try:
        check_fields(hints(conditioner, conditioner.SETTINGS), settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_configs(
    source: str | os.PathLike | Mapping[str, Path], vlm: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The networks' sizes from their config.json, by folder name; arguments as `load_bundle`, or the folders themselves."""
    if not isinstance(source, Mapping):
        folder = find_model(source)
        source = _component_folders(folder, family_of_folder(folder), vlm)
    return {name: _read_config(name, folder) for name, folder in source.items()}


def _read_config(name: str, folder: Path) -> ModelConfig:
    """The config of the class that config.json states. Where it states none, a folder of this name has only one class."""
    if (stated := class_name(folder)) in NETWORKS:
        return NETWORKS[stated].config.read(folder)
    (known, *_) = (family.networks[name] for family in FAMILIES.values() if name in family.networks)
    return NETWORKS[known].config.read(folder)


def _load_folders(
    folders: Mapping[str, Path],
    configs: Mapping[str, Any],
    modules: tuple[Any, Any, Any],
    mesh: Mesh | None,
    precision: Precision,
) -> dict[str, Any]:
    """Parameters of these networks, by folder name."""
    abstract = _by_folder(jax.eval_shape(lambda key: init_params(*modules, key), jax.random.key(0)))
    # All headers are checked before the first tensor is read: a full model takes minutes.
    parts = {name: (at, network_of(configs[name]).rules(configs[name]), abstract[name]) for name, at in folders.items()}
    for part in parts.values():
        native.check_component(*part)
    placed = dict.fromkeys(abstract) if mesh is None else shardings(mesh, abstract)
    return {name: native.load_component(*part, placed[name], precision) for name, part in parts.items()}


def save_bundle(
    bundle: Bundle,
    folder: str | os.PathLike,
    dtype: Any = "float32",
    with_vlm: bool = True,
    changed: Collection[str] | None = None,
) -> Path:
    """Writes a folder that `load_bundle` and diffusers' `StableDiffusion3Pipeline.from_pretrained` read.

    Args:
      dtype: of the files: float32, float16 or bfloat16; None keeps each parameter's own.
      with_vlm: write a MetaQuery model's vision-language model, too, which no training changes.
      changed: with `dtype` None: which leaves ('transformer/path/to/leaf') are not what was read. All others are copied from
        `bundle.files` bit for bit, and these get the dtypes that their files have; a new network has no files and keeps its own.

    Raises:
      FileNotFoundError: when what has to be copied is not there any more.
      ValueError: when a parameter does not fit `dtype` (too large for float16, or not finite).
    """
    folder = Path(folder)
    dtype = None if dtype is None else check_dtype(dtype)
    params = _by_folder(bundle.params)
    modules, family = bundle.modules, bundle.family
    for name, module in modules.items():
        if name == family.reader and not with_vlm:
            continue
        config, network = module.config, network_of(module.config)
        rules = network.rules(config)
        if dtype is None and changed is not None and name in bundle.files:
            group = f"{name}/" if name in bundle.params else f"conditioner/{name}/"
            changed_leaves = {path.removeprefix(group) for path in changed if path.startswith(group)}
            tensors = native.with_changes(bundle.files[name], rules, params[name], changed_leaves)
        else:
            tensors = table.to_torch(rules, params[name], dtype)
        tensors = _finite(tensors, name)
        with np.errstate(over="ignore"):  # reported by _finite, as an error
            io.write_folder(folder / name, network.stem, tensors)
        values = network.config_values(config, "" if dtype is None else str(dtype))
        write_json(folder / name / "config.json", values)
    bundle.scheduler.save(folder / "scheduler")
    conditioner = bundle.conditioner
    write_json(folder / EXTRAS_FILE, {name: getattr(conditioner, name) for name in conditioner.SETTINGS})
    if with_vlm or not family.reader:
        conditioner.save_tokenizers(folder)
    if family.model_index is not None:
        write_json(folder / "model_index.json", family.model_index(modules))
    return folder


def find_model(source: str | os.PathLike, patterns: Sequence[str] | None = None) -> Path:
    """The local folder of a model: `source` itself, the copy of an address, or the snapshot of a hub id ('owner/name',
    'owner/name@revision'), of which `patterns` are fetched; None: those of a model of any family.

    Raises:
      FileNotFoundError: when there is neither; of a hub id it says why (`core.hub`).
    """
    if is_address(source):
        return fetched(os.fspath(source), lambda name: name.endswith(tuple(f".{kind}" for kind in FILES)))
    path = Path(source)
    if path.is_dir():
        return path
    if path.suffix in io.PICKLES and path.exists():
        raise ValueError(io.no_pickles(path))
    if path.exists():
        raise FileNotFoundError(f"{source} is a file, not a model folder; a single checkpoint file must be converted.")
    if not hub.is_id(source):
        raise FileNotFoundError(f"There is no model folder {source}; check the path.")
    return hub.snapshot(os.fspath(source), list(patterns or _hub_patterns()), ["*.fp16*"])


def _hub_patterns() -> list[str]:
    families = FAMILIES.values()
    folders = dict.fromkeys(name for family in families for name in (*family.networks, *family.tokenizer_folders))
    return [
        *(f"{name}/*.{kind}" for name in folders for kind in FILES),
        "scheduler/*.json",
        "model_index.json",
        EXTRAS_FILE,
    ]


def _kinds(dtype: Any) -> dict[str, Any]:
    """Options of a network. What is drawn is drawn as what is trained, and held as frozen afterwards."""
    precision = as_precision(dtype)
    return {"dtype": precision.compute, "param_dtype": precision.trained}


def make_modules(
    configs: Mapping[str, Any], tokenizers: Any, settings: Mapping[str, Any], dtype: Any
) -> tuple[Any, Any, Any]:
    """(transformer, vae, conditioner) of the networks with these configs, by folder name.

    Args:
      tokenizers: as the family's `load_tokenizers` gives them.
      settings: the conditioner's own fields, as `unipic2.json` holds them.
      dtype: a `Precision`, or a dtype for everything.
    """
    options = _kinds(dtype)
    conditioner = family_of(configs).make_conditioner(configs, tokenizers, settings, options)
    transformer, vae = (network_of(configs[name]).module(configs[name], **options) for name in ("transformer", "vae"))
    return transformer, vae, conditioner


def _by_group(folders: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_by_folder`."""
    whole = {name: folders[name] for name in ("transformer", "vae")}
    return {**whole, "conditioner": {name: tree for name, tree in folders.items() if name not in whole}}


def _by_folder(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"transformer": params["transformer"], "vae": params["vae"], **params["conditioner"]}


def _component_folders(folder: Path, family: Family, vlm: str | os.PathLike | None) -> dict[str, Path]:
    """Where the networks of a model are; an optional one may be left out only where model_index.json says so."""
    index = read_object(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    left_out = lambda name: name in family.optional and index.get(name, True) in (None, [None] * 2)
    names = [name for name in family.networks if not left_out(name)]
    folders = {name: folder / name for name in names}
    if vlm is not None:
        if not family.reader:
            raise ValueError(
                f"The model folder {folder} has text encoders and takes no vision-language model; leave vlm out."
            )
        folders[family.reader] = find_model(vlm, VLM_PATTERNS)
    for name, at in folders.items():
        if not (at / "config.json").is_file():
            what = f"{name}/config.json" if at.is_dir() else f"the folder {name}/"
            more = "; put Qwen2.5-VL there, or name its folder with vlm" if name == family.reader else ""
            raise FileNotFoundError(
                f"The model folder {folder} lacks {what}; a model of this kind holds {', '.join(names)}, "
                f"scheduler and the tokenizers{more}."
            )
    return folders


def _finite(tensors: Iterable[tuple[str, np.ndarray]], component: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(
                f"The {component}'s {name} is not finite as {array.dtype}; save it as float32 or bfloat16, and if that "
                "fails too, the training has diverged."
            )
        yield name, array
