"""DeepGen's conditioner: Qwen2.5-VL reads prompt, pictures and learned queries; several layers' states become the context.

Original: `generate` and `prepare_forward_input` of deepgenteam/deepgen, `qwen2_5_vl_sd3_hf_dynamic_fusion.py`. What differs from
MetaQuery: states of six layers instead of the last; at *every* place of the sequence instead of the queries alone, padding too;
3-D positions; pictures of their own sizes, each as tokens and as latents; and the vision-language model may have a LoRA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from einops import rearrange

from unipic2_jax.models.conditioner import check_prompts
from unipic2_jax.models.deepgen.network import DecoderLoRA, DecoderLoRAConfig, DeepGenConfig
from unipic2_jax.models.deepgen.pictures import TowerPictures
from unipic2_jax.models.metaquery.conditioner import T2I_TEMPLATE, MetaQueryConditioner
from unipic2_jax.models.qwen.decoder import example_inputs
from unipic2_jax.models.qwen.processor import VLMInput, VLMProcessor, user_message
from unipic2_jax.pictures.decode import to_pil

# Which places of the sequence the connector reads.
READS = ("all", "queries")
# Tokens of a short prompt with its template, where the length of prompts is left open.
TYPICAL_LENGTH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class DeepGenConditioner(MetaQueryConditioner):
    """Prompts and pictures to (context, pooled); `connector.config` is a `DeepGenConfig`.

    `params` of `apply` is `{'vlm': ..., 'conditioner': ..., 'lora': ...}`, the last where there is a LoRA.

    Attributes:
      lora: of the vision-language model; None: it is as it is, or its update is merged into it.
      positions: 'mrope' as the original, or '1d'.
      reads: 'all' places, as the released weights; or the 'queries' alone, a variant that its code mentions, whose context has one
        length. With 'all' the context is as long as the prompts' batch is padded: max_sequence_length makes that one number.
      others: as of `MetaQueryConditioner`.
    """

    positions: str = "mrope"
    lora: DecoderLoRA | None = None
    reads: str = "all"

    own_sizes: ClassVar[bool] = True
    SETTINGS: ClassVar[tuple[str, ...]] = (*MetaQueryConditioner.SETTINGS, "reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        deepest, layers = max(self.sizes.fused_layers), self.vlm.config.num_hidden_layers
        if deepest >= layers:
            raise ValueError(
                f"The connector reads what layer {deepest} reads but the vision-language model has {layers} layers, counted from 0; "
                "they are from different models."
            )
        if self.reads not in READS:
            raise ValueError(f"reads is {self.reads!r}; choose one of {', '.join(READS)}.")
        if self.lora is not None:
            config = self.lora.config
            if config != DecoderLoRAConfig.of(self.vlm.config, config.r, config.lora_alpha):
                raise ValueError(
                    "The folder lora/ updates a vision-language model of other sizes; use the one that it was made for."
                )

    @property
    def sizes(self) -> DeepGenConfig:
        """The sizes of queries and connector."""
        return cast(DeepGenConfig, self.connector.config)

    @property
    def context_length(self) -> int:
        """Tokens of the context of a prompt without pictures, S."""
        queries = self.connector.config.num_queries
        return queries if self.reads == "queries" else (self.max_sequence_length or TYPICAL_LENGTH) + queries

    @property
    def description(self) -> str:
        """The vision-language model's and the connector's sizes."""
        layers, config = self.vlm.config.num_hidden_layers, self.sizes
        return f"DeepGen (Qwen2.5-VL of {layers} layers, {config.num_queries} queries, {len(config.fused_layers)} layers' states)"

    @property
    def modules(self) -> dict[str, Any]:
        """The networks by folder."""
        return super().modules if self.lora is None else {**super().modules, "lora": self.lora}

    @functools.cached_property
    def _reader(self) -> VLMProcessor:
        """The processor, with the original's way of showing the tower a picture; a stand-in without pictures stays as it is."""
        if (pictures := getattr(self.processor, "image_processor", None)) is None:
            return self.processor
        shown = TowerPictures(
            self.vision_scale,
            pictures.patch_size,
            pictures.merge_size,
            pictures.temporal_patch_size,
            tuple(pictures.image_mean),
            tuple(pictures.image_std),
        )
        return dataclasses.replace(self.processor, image_processor=shown)

    def tokenize(self, prompts: Sequence[str] | str, images: Sequence[Sequence[Any]] | None = None) -> VLMInput:
        """Conversations for the prompts: `Generate an image: ...`, or the pictures, a line's end, and the raw instruction.

        Args:
          images: for each prompt the pictures that it edits, each of the size at which its latents are made; see
            `pictures.decode.to_pil`. A prompt without one is text-to-image.

        Raises:
          ValueError: for a picture that does not divide into tokens, or a prompt longer than max_sequence_length.
        """
        prompts = check_prompts(prompts)
        rows = [[to_pil(picture) for picture in row] for row in images or [()] * len(prompts)]
        if len(rows) != len(prompts):
            raise ValueError(f"There are images for {len(rows)} prompts of {len(prompts)}; give one entry for each.")
        texts = [text if row else T2I_TEMPLATE.format(prompt=text) for row, text in zip(rows, prompts)]
        if self.reference_path == "dit":
            rows = [[] for _ in rows]
        messages = [[user_message(row, f"\n{text}" if row else text)] for row, text in zip(rows, texts)]
        # What a picture becomes for the tower; `TowerPictures` goes by the scale alone, whatever sizes there are.
        pixels = next((picture.width * picture.height * self.vision_scale**2 for row in rows for picture in row), None)
        return self._reader(
            messages,
            system_prompt=False,
            mrope=self.positions == "mrope",
            pixels=pixels,
            text_length=self.max_sequence_length,
        )

    def apply(self, params: dict[str, Any], tokens: VLMInput) -> tuple[jax.Array, jax.Array]:
        """Encodes what `tokenize` gave: context [B, S, J] and pooled [B, P], S = T + Q (Q where the queries alone are read)."""
        vlm, connector = {"params": params["vlm"]}, {"params": params["conditioner"]}
        if self.lora is not None:
            vlm["lora"] = self.lora.apply({"params": params["lora"]})
        reader, count = self.vlm.clone(states=self.sizes.fused_layers), self.sizes.num_queries
        batch = tokens.input_ids.shape[0]
        embeddings = reader.apply(vlm, tokens.input_ids, tokens.vision, method="embed")
        queries = self.connector.apply(connector, batch, method="queries").astype(embeddings.dtype)
        # The queries are ordinary text behind the prompt.
        before = rearrange(jnp.asarray(tokens.positions), "b three t -> three b t")
        following = jnp.broadcast_to(before.max(axis=(0, 2))[:, None] + 1 + jnp.arange(count), (3, batch, count))
        states, _ = reader.apply(
            vlm,
            jnp.concatenate([embeddings, queries], axis=1),
            jnp.concatenate([before, following], axis=-1),
            jnp.concatenate([jnp.asarray(tokens.valid), jnp.ones((batch, count), bool)], axis=-1),
            method="decode",
        )
        return self.connector.apply(connector, states if self.reads == "all" else states[:, -count:])

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters of the networks."""
        keys = jax.random.split(key, 3)
        params = {
            "conditioner": self.connector.init(keys[0], jnp.zeros((1, 1, self.sizes.read_size)))["params"],
            "vlm": self.vlm.init(keys[1], *example_inputs(self.vlm.config))["params"],
        }
        return params if self.lora is None else {**params, "lora": self.lora.init(keys[2])["params"]}
