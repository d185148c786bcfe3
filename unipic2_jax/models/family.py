"""What a base model says of itself: its networks, its folder, its conditioner, its sizes.

A family stands in a folder of its own and registers itself (`models.registry`); the loader, the converter, LoRA, the planner, the
sharding and the optimizer ask it. docs/extending/model.md walks through one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn

from unipic2_jax.models.config import ModelConfig
from unipic2_jax.weights import io
from unipic2_jax.weights.table import Rule

if TYPE_CHECKING:
    from unipic2_jax.models.conditioner import Conditioner

# Who wrote a network's folder: the stem of its safetensors' names.
LIBRARIES = {"diffusers": io.DIFFUSERS_STEM, "transformers": io.TRANSFORMERS_STEM}


@dataclasses.dataclass(frozen=True)
class Network:
    """One kind of network.

    Attributes:
      config: its config dataclass, whose CLASS_NAME its config.json states.
      module: (config, dtype=, param_dtype=) -> the linen module.
      rules: config -> name table.
      inputs: config -> the smallest arguments that it can be called with.
      library: one of LIBRARIES.
    """

    config: type[ModelConfig]
    module: Callable[..., nn.Module]
    rules: Callable[[Any], tuple[Rule, ...]]
    inputs: Callable[[Any], tuple[Any, ...]]
    library: str = "diffusers"

    def init(self, module: nn.Module, key: jax.Array) -> dict[str, Any]:
        """Random parameters."""
        return module.init(key, *self.inputs(module.config))["params"]

    def abstract(self, config: ModelConfig) -> dict[str, Any]:
        """Shapes of the parameters; allocates nothing."""
        return jax.eval_shape(lambda key: self.init(self.module(config), key), jax.random.key(0))

    @property
    def stem(self) -> str:
        """The stem of the names of its safetensors."""
        return LIBRARIES[self.library]

    def config_values(self, config: ModelConfig, dtype: str = "") -> dict[str, Any]:
        """What its library writes into config.json; transformers also says the dtype of the files."""
        if self.library == "diffusers":
            return {"_class_name": config.CLASS_NAME, **config.to_dict()}
        kind = {"architectures": [config.CLASS_NAME], "model_type": config.MODEL_TYPE}
        return {**kind, **config.to_dict(), **({"dtype": dtype} if dtype else {})}


@dataclasses.dataclass(frozen=True)
class Backbone(Network):
    """The network that draws, and what the rest of the system has to know about it.

    Attributes:
      velocity: (module, variables, latents [B, h, w, C], timestep [B], context [B, S, J], pooled [B, P], references, their sizes) ->
        velocity [B, h, w, C]: the one place that calls it. References are [B, R, h, w, C] or None.
      flops: (config, target_tokens, text_tokens, reference_tokens) of one forward pass of one sample.
      lora_targets: names of the layers that a LoRA adapts where nobody says which.
      init_lora: (key, params, rank, targets=) -> a LoRA that changes nothing yet.
      never_trained: a regex on 'path/to/leaf': tables that the original keeps as buffers. Training one would leave the family of
        models that the original can load.
    """

    velocity: Callable[..., jax.Array] = dataclasses.field(kw_only=True)
    flops: Callable[..., int] = dataclasses.field(kw_only=True)
    lora_targets: tuple[str, ...] = ()
    init_lora: Callable[..., dict[str, Any]] = dataclasses.field(kw_only=True)
    never_trained: str = "(?!)"


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """One file that holds a model of a family, in a layout of its authors' own. `models.convert` reads and writes it.

    Attributes:
      owns: (names of a file's tensors) -> whether it is such a file.
      unpack: (its tensors, base or None, folder) -> notes; writes the model folder in diffusers layout that the file is together with
        what it lacks and the base has. What no network uses goes to `weights.native.UNUSED`.
      pack: (model folder in diffusers layout, file); the inverse. Files at the folder's top that are no weights come along both ways.
    """

    owns: Callable[[Iterable[str]], bool]
    unpack: Callable[[io.Checkpoint, Path | None, Path], list[str]]
    pack: Callable[[Path, Path], None]


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one layout.

    Attributes:
      name: it is registered under.
      networks: folder -> class name of its network (`models.registry.NETWORKS`). 'transformer' and 'vae' are always there; all
        others are the conditioner's.
      conditioner: the class.
      make_conditioner: (configs by folder, tokenizers, settings, options of a network) -> the conditioner.
      load_tokenizers: (model folder, configs by folder, folders of the networks) -> what `make_conditioner` takes.
      tokenizer_folders: of a model folder; empty where a network's own folder holds them.
      reader: the network whose folder holds the tokenizer, if one does. It may lie elsewhere, is frozen, and is not saved twice.
      recognises: (model folder) -> whether it is of this family. None: it is what no other family recognises.
      optional: networks that a model may lack, where its model_index.json says so.
      file: how one file holds a model of this family, where its authors have a way of their own.
      model_index: (networks that are there) -> model_index.json; None: no class of diffusers holds such a model as a whole.
    """

    name: str
    networks: Mapping[str, str]
    conditioner: type[Conditioner]
    make_conditioner: Callable[..., Conditioner]
    load_tokenizers: Callable[..., Any]
    tokenizer_folders: tuple[str, ...] = ()
    reader: str = ""
    recognises: Callable[[Path], bool] | None = None
    optional: tuple[str, ...] = ()
    model_index: Callable[..., dict[str, Any]] | None = None
    file: FileFormat | None = None


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The networks of one model, under their folder names, and what the pipeline needs beside them.

    Attributes:
      family: name of it.
      networks: folder -> config.
      shift: of the flow-matching schedule.
      settings: of the conditioner, beside its networks.
      tokenizers: configs by folder -> the tokenizers of a new model, where it has some of its own.
    """

    family: str
    networks: Mapping[str, ModelConfig]
    shift: float
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizers: Callable[[Mapping[str, ModelConfig]], Any] | None = None
