"""Models without weights and tokenizers without words: what is needed to compile a training step, and no more."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unipic2_jax.flow.schedule import FlowMatchConfig
from unipic2_jax.models.bundle import Bundle, init_params, make_modules, read_configs
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.qwen.pictures import LEVELS, Levels, Look
from unipic2_jax.models.qwen.processor import LEAST_TOKENS, VLMInput, bucket
from unipic2_jax.models.qwen.vision import VisionInput, lay_out
from unipic2_jax.models.registry import SIZES, family_of
from unipic2_jax.parallel.rules import described
from unipic2_jax.weights.precision import as_precision

PROMPT_TOKENS = 48  # of a prompt with its template, images not counted


class BlankTokenizer:
    """As many tokens as are asked for, all of them 0."""

    def __init__(self, model_max_length: int = 77):
        self.model_max_length = model_max_length

    def __len__(self) -> int:
        return 1

    def __call__(self, prompts: Sequence[str], max_length: int = 1, **options: Any) -> dict[str, np.ndarray]:
        shape = (len(prompts), max_length)
        return {"input_ids": np.zeros(shape, np.int64), "attention_mask": np.zeros(shape, np.int64)}


class BlankProcessor:
    """Conversations as `VLMProcessor` would lay them out, if every prompt had PROMPT_TOKENS tokens; images are black."""

    def __init__(self, config: Qwen2_5_VLConfig):
        self.config = config

    def __call__(
        self,
        conversations: Sequence[Any],
        *,
        pixels: float | None = None,
        text_length: int | None = None,
        **options: Any,
    ) -> VLMInput:
        del options
        tower = self.config.vision_config
        edge = tower.patch_size * tower.spatial_merge_size
        parts = [
            part for messages in conversations for m in messages for part in m["content"] if part["type"] == "image"
        ]
        grids = []
        for part in parts:
            width, height = part["image"].size
            scale = 1.0 if pixels is None else (pixels / (width * height)) ** 0.5
            merged = [max(1, round(length * scale / edge)) for length in (height, width)]
            grids.append((1, *(n * tower.spatial_merge_size for n in merged)))
        grids = np.array(grids, int).reshape(-1, 3)
        each = len(parts) // len(conversations)
        room = int(np.prod(grids[:each], axis=1).sum()) // tower.merged
        length = text_length + room if text_length is not None else bucket(PROMPT_TOKENS + room, LEAST_TOKENS)
        ids = np.zeros((len(conversations), length), np.int32)
        ids[:, :room] = self.config.image_token_id
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (len(ids), 3, length))
        vision = self._vision(ids, grids) if len(grids) else None
        return VLMInput(ids, positions, np.ones(ids.shape, bool), vision)

    def _vision(self, ids: np.ndarray, grids: np.ndarray) -> VisionInput:
        """The pictures as `VLMProcessor` would lay them out: what is black costs what any other does."""
        tower = self.config.vision_config
        table = np.zeros((3, LEVELS), np.float32).tobytes()
        look = Look(tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size, table)
        layout = lay_out(tower, ids, {self.config.image_token_id: grids})
        layout = lay_out(tower, ids, {self.config.image_token_id: grids}, bucket(layout.frames.shape[1]))
        windows = np.zeros((*layout.source.shape, look.patch_levels), np.uint8)
        return VisionInput(Levels(windows, (), None, (), look), layout.places, layout.frames, layout.tokens)


def blank_tokenizers(configs: Mapping[str, Any]) -> Any:
    """What `make_modules` takes as the tokenizers of the networks with these configs, by folder."""
    family = family_of(configs)
    if family.reader:
        return BlankProcessor(configs[family.reader])
    return dict.fromkeys(family.tokenizer_folders, BlankTokenizer(configs["text_encoder"].max_position_embeddings))


def abstract_bundle(config: ConfigDict, mesh: Mesh) -> Bundle:
    """The model of a run's configuration with descriptions of parameters, all of them held as frozen ones are, where they
    would be on the mesh.

    Of `config.init` and `config.parts` only the config.json of each network is read; where they name no folder, the sizes
    called `config.model` stand for them.
    """
    sizes = SIZES[config.model]
    configs = dict(sizes.networks)
    if config.init:
        configs = read_configs(config.init, config.vlm)
    for name, folder in config.parts.items():
        if os.fspath(folder):
            configs |= read_configs({name: Path(folder)})
    precision = as_precision(config.precision)
    settings = {**sizes.settings, **config.settings.to_dict()}
    transformer, *others = make_modules(configs, blank_tokenizers(configs), settings, precision)
    modules = (transformer.clone(attention_implementation=config.attention), *others)
    new = lambda key: precision.hold(init_params(*modules, key))
    params = jax.eval_shape(new, jax.eval_shape(lambda: jax.random.key(0)))
    return Bundle(*modules, FlowMatchConfig(shift=sizes.shift), described(mesh, params))
