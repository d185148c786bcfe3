"""A whole model: its networks, tokenizers, schedule and parameters, and its folder in diffusers layout."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unipic2_jax.data.shapes.pool import WORDS
from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models.clip import CLIPTextConfig, CLIPTextModelWithProjection
from unipic2_jax.models.mmdit import MMDiT, MMDiTConfig
from unipic2_jax.models.sizes import SIZES, ModelSizes
from unipic2_jax.models.t5 import T5Config, T5Encoder
from unipic2_jax.models.vae import AutoencoderKL, VAEConfig
from unipic2_jax.parallel.mesh import replicated
from unipic2_jax.pipelines.conditioner import TextConditioner, load_tokenizers
from unipic2_jax.pipelines.tiny_tokenizers import build_tokenizers
from unipic2_jax.weights import clip, io, mmdit, native, t5, table, vae

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
# Folder -> (config class, name table). The folders are those of diffusers.
COMPONENTS = {
    "transformer": (MMDiTConfig, mmdit.rules),
    "vae": (VAEConfig, vae.rules),
    "text_encoder": (CLIPTextConfig, clip.rules),
    "text_encoder_2": (CLIPTextConfig, clip.rules),
    "text_encoder_3": (T5Config, t5.rules),
}
# What diffusers does not know about a model; it leaves files of other names alone.
EXTRAS_FILE = "unipic2.json"
# The published scripts resize an edit's longer edge to this.
EDIT_PIXELS = 512
FAST_COMPILE = {"xla_backend_optimization_level": 0}
DTYPES = ("float32", "bfloat16", "float16")
# Weights come as safetensors only: nothing that is downloaded is ever executed.
HUB_PATTERNS = [f"{name}/*.{kind}" for name in (*COMPONENTS, *TOKENIZERS) for kind in ("json", "txt", "safetensors")]
HUB_PATTERNS += ["scheduler/*.json", "model_index.json", EXTRAS_FILE]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """Modules, parameters and schedule of one model.

    Attributes:
      params: {'transformer': ..., 'vae': ..., 'conditioner': {'text_encoder': ..., ...}}.

    Raises:
      ValueError: when the networks do not fit each other.
    """

    transformer: MMDiT
    vae: AutoencoderKL
    conditioner: TextConditioner
    scheduler: FlowMatchConfig
    params: dict[str, Any]

    def __post_init__(self) -> None:
        config = self.transformer.config
        for what, ours, theirs in (
            ("joint_attention_dim", config.joint_attention_dim, self.conditioner.joint_attention_dim),
            ("pooled_projection_dim", config.pooled_projection_dim, self.conditioner.pooled_dim),
            ("in_channels", config.in_channels, self.vae.config.latent_channels),
        ):
            if ours != theirs:
                raise ValueError(
                    f"The transformer's {what} is {ours} but the text encoders or the VAE give {theirs}; "
                    "these folders are from different models."
                )

    def replace(self, **changes: Any) -> Self:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

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
        """Edge in pixels of a picture generated without height and width, as in diffusers."""
        return self.transformer.config.sample_size * self.vae_scale

    @property
    def edit_size(self) -> int:
        """Longer edge in pixels of an edit made without height and width."""
        return min(EDIT_PIXELS, self.default_size)

    @property
    def largest_size(self) -> int:
        """The longest edge in pixels that the position table covers."""
        return self.transformer.config.pos_embed_max_size * self.patch_pixels


def make_conditioner(configs: Mapping[str, Any], tokenizers: Mapping[str, Any], width: int, **options: Any):
    """The text conditioner for the configs of the three text encoders (the third may be absent).

    Args:
      configs: by folder name. tokenizers: by folder name, transformers objects. width: joint_attention_dim.
      options: `dtype`, `param_dtype`, and `max_sequence_length`.
    """
    length = options.pop("max_sequence_length")
    third = configs.get("text_encoder_3")
    return TextConditioner(
        CLIPTextModelWithProjection(configs["text_encoder"], **options),
        CLIPTextModelWithProjection(configs["text_encoder_2"], **options),
        None if third is None else T5Encoder(third, **options),
        *(tokenizers[name] for name in TOKENIZERS[:2]),
        None if third is None else tokenizers["tokenizer_3"],
        max_sequence_length=length,
        joint_attention_dim=width,
    )


def init_params(transformer: MMDiT, vae: AutoencoderKL, conditioner: TextConditioner, key: jax.Array) -> dict[str, Any]:
    """Random parameters of all networks: the tree of `Bundle.params`."""
    config = transformer.config
    keys = jax.random.split(key, 3)
    latents = jnp.zeros((1, config.patch_size, config.patch_size, config.in_channels))
    context = jnp.zeros((1, 1, config.joint_attention_dim))
    pooled = jnp.zeros((1, config.pooled_projection_dim))
    image = jnp.zeros((1, vae.config.downsampling, vae.config.downsampling, vae.config.in_channels))
    return {
        "transformer": transformer.init(keys[0], latents, jnp.zeros(1), context, pooled)["params"],
        "vae": vae.init(keys[1], image)["params"],
        "conditioner": conditioner.init(keys[2]),
    }


def init_bundle(
    sizes: ModelSizes | str,
    seed: int | jax.Array = 0,
    *,
    tokenizers: Mapping[str, Any] | str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> Bundle:
    """A model with random weights.

    Args:
      sizes: `models.sizes.SIZES[...]`, or the name of one.
      seed: a number or a PRNG key.
      tokenizers: by folder name, or a folder that holds them (`tokenizer/` ...). None builds those of the shapes world,
        which fit the tiny model only.
      mesh: parameters are replicated over it; None: the default device.
      dtype: of parameters and arithmetic; float32 by default.

    Raises:
      ValueError: when the size is unknown, or the tokenizers do not fit the text encoders.
    """
    if isinstance(sizes, str):
        if sizes not in SIZES:
            raise ValueError(f"The model size {sizes!r} is unknown; choose one of {', '.join(SIZES)}.")
        sizes = SIZES[sizes]
    if tokenizers is None:
        with tempfile.TemporaryDirectory() as folder:
            build_tokenizers(WORDS, sizes.text_encoder.max_position_embeddings, folder)
            tokenizers = load_tokenizers(folder)
    elif isinstance(tokenizers, (str, os.PathLike)):
        tokenizers = load_tokenizers(tokenizers)
    configs = {name: getattr(sizes, name) for name in COMPONENTS}
    modules = make_modules(configs, tokenizers, sizes.max_sequence_length, _dtype(dtype))
    key = jax.random.key(seed) if isinstance(seed, (int, np.integer)) else seed
    sharding = None if mesh is None else replicated(mesh)
    # It runs once, so compiling fast matters and running fast does not.
    init = jax.jit(lambda key: init_params(*modules, key), out_shardings=sharding, compiler_options=FAST_COMPILE)
    params = init(key)
    return Bundle(*modules, FlowMatchConfig(shift=sizes.shift), params)


def load_bundle(source: str | os.PathLike, dtype: Any = None, mesh: Mesh | None = None) -> Bundle:
    """Reads a model folder in diffusers layout, with safetensors or with what `convert.from_torch` writes.

    Args:
      source: the folder, or the id of a model on the Hugging Face hub ('owner/name'), of which only safetensors, JSON
        and text files are fetched.
      dtype: of parameters and arithmetic: float32 (default), bfloat16 or float16, whatever the files hold.
      mesh: parameters are replicated over it; None: the default device.

    Raises:
      FileNotFoundError: the folder or a part of it is missing.
      ValueError: a file is damaged, or a tensor is missing, extra or of another shape. Both come before any weight is
        read.
    """
    folder = find_model(source)
    dtype = _dtype(dtype)
    names = _component_names(folder)
    configs = {name: COMPONENTS[name][0].from_dict(_read_json(folder / name / "config.json")) for name in names}
    scheduler = FlowMatchConfig.load(folder / "scheduler")
    extras = _read_json(folder / EXTRAS_FILE) if (folder / EXTRAS_FILE).is_file() else {}
    for name in TOKENIZERS:
        if name.replace("tokenizer", "text_encoder") in names and not (folder / name).is_dir():
            raise FileNotFoundError(f"The model folder {folder} lacks {name}/; copy it from the original checkpoint.")
    length = int(extras.get("max_sequence_length", 256))
    modules = make_modules(configs, load_tokenizers(folder), length, dtype)

    abstract = _by_folder(jax.eval_shape(lambda key: init_params(*modules, key), jax.random.key(0)))
    # All headers are checked before the first tensor is read: a full model takes minutes.
    parts = {name: (folder / name, COMPONENTS[name][1](configs[name]), abstract[name]) for name in names}
    for part in parts.values():
        native.check_component(*part)
    sharding = None if mesh is None else replicated(mesh)
    loaded = {name: native.load_component(*part, sharding, dtype) for name, part in parts.items()}
    params = {name: loaded.pop(name) for name in ("transformer", "vae")}
    return Bundle(*modules, scheduler, {**params, "conditioner": loaded})


def save_bundle(bundle: Bundle, folder: str | os.PathLike, dtype: Any = "float32") -> Path:
    """Writes a folder that `load_bundle` and diffusers' `StableDiffusion3Pipeline.from_pretrained` read.

    Args:
      dtype: of the files: float32, float16 or bfloat16; None keeps each parameter's own.

    Raises:
      ValueError: when a parameter does not fit `dtype` (too large for float16, or not finite).
    """
    folder = Path(folder)
    dtype = None if dtype is None else _dtype(dtype)
    params = _by_folder(bundle.params)
    modules = {"transformer": bundle.transformer, "vae": bundle.vae, **_text_modules(bundle.conditioner)}
    for name, module in modules.items():
        config = module.config
        tensors = _finite(table.to_torch(COMPONENTS[name][1](config), params[name], dtype), name)
        is_text = name in TEXT_ENCODERS
        stem = io.TRANSFORMERS_STEM if is_text else io.DIFFUSERS_STEM
        with np.errstate(over="ignore"):  # reported by _finite, as an error
            io.write_folder(folder / name, stem, tensors)
        values = {"_class_name": config.CLASS_NAME, **config.to_dict()}
        if is_text:
            kind = {"architectures": [config.CLASS_NAME], "model_type": config.MODEL_TYPE}
            values = {**kind, **config.to_dict(), **({} if dtype is None else {"dtype": str(dtype)})}
        _write_json(folder / name / "config.json", values)
    bundle.scheduler.save(folder / "scheduler")
    bundle.conditioner.save_tokenizers(folder)
    extras = {"max_sequence_length": bundle.conditioner.max_sequence_length}
    _write_json(folder / EXTRAS_FILE, extras)
    _write_json(folder / "model_index.json", _model_index(modules))
    return folder


def find_model(source: str | os.PathLike) -> Path:
    """The local folder of a model: `source` itself, or the snapshot of a hub id.

    Raises:
      FileNotFoundError: when there is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{source} is a file, not a model folder; a single checkpoint file must be converted.")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", os.fspath(source)):
        raise FileNotFoundError(f"There is no model folder {source}; check the path.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=HUB_PATTERNS, ignore_patterns=["*.fp16*"]))
    # Whatever went wrong between here and the hub (connection, licence, name) is told in the hub's own words.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"There is no model folder {source}, and the hub gave no model of that name ({reason[0]}); "
            "check the name, or download it and pass the folder."
        ) from error


def make_modules(configs: Mapping[str, Any], tokenizers: Mapping[str, Any], length: int, dtype: Any):
    """(transformer, vae, conditioner) for configs by folder name; `length` is the conditioner's max_sequence_length."""
    options = {"dtype": dtype, "param_dtype": dtype}
    width = configs["transformer"].joint_attention_dim
    conditioner = make_conditioner(configs, tokenizers, width, max_sequence_length=length, **options)
    return MMDiT(configs["transformer"], **options), AutoencoderKL(configs["vae"], **options), conditioner


def _text_modules(conditioner: TextConditioner) -> dict[str, Any]:
    modules = dict(zip(TEXT_ENCODERS, (conditioner.clip_l, conditioner.clip_g, conditioner.t5), strict=True))
    return {name: module for name, module in modules.items() if module is not None}


def _by_folder(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"transformer": params["transformer"], "vae": params["vae"], **params["conditioner"]}


def _dtype(dtype: Any) -> np.dtype:
    name = "float32" if dtype is None else str(jnp.dtype(dtype))
    if name not in DTYPES:
        raise ValueError(f"The dtype {name!r} is not supported for a model; choose one of {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def _component_names(folder: Path) -> list[str]:
    """The networks of a model folder; T5 may be left out only where model_index.json says so."""
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    names = [name for name in COMPONENTS if name != "text_encoder_3" or index.get(name, True) not in (None, [None] * 2)]
    for name in names:
        if not (folder / name / "config.json").is_file():
            what = f"{name}/config.json" if (folder / name).is_dir() else f"the folder {name}/"
            raise FileNotFoundError(
                f"The model folder {folder} lacks {what}; a model in diffusers layout holds {', '.join(names)}, "
                "scheduler and the tokenizers."
            )
    return names


def _model_index(modules: Iterable[str]) -> dict[str, Any]:
    """diffusers' model_index.json: where each component's class lives."""
    with_t5 = "text_encoder_3" in modules
    nothing = [None, None]
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"] if with_t5 else nothing,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"] if with_t5 else nothing,
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _finite(tensors: Iterable[tuple[str, np.ndarray]], component: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(
                f"The {component}'s {name} is not finite as {array.dtype}; save it as float32 or bfloat16, and if that "
                "fails too, the training has diverged."
            )
        yield name, array


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; copy it again.")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
