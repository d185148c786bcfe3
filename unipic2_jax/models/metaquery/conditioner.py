"""MetaQuery's conditioner: a frozen Qwen2.5-VL reads the prompt, and for an edit the image, and learned queries behind it.

Original: UniPic 2.0's scripts `unipic2_mq_t2i.py` and `unipic2_mq_editing.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange

from unipic2_jax.models.conditioner import check_prompts
from unipic2_jax.models.metaquery.connector import MetaQuery
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL, example_inputs, init_cache
from unipic2_jax.models.qwen.processor import VLMInput, VLMProcessor, user_message
from unipic2_jax.models.sd3.conditioner import EDIT_NEGATIVE
from unipic2_jax.pictures.decode import to_pil

T2I_TEMPLATE = "Generate an image: {prompt}"
# The tower sees an edit's image at this part of its edges: one merged token of 28 pixels for 32 of the image.
VISION_SCALE = 28 / 32
POSITIONS = ("1d", "mrope")
# Where the pictures of an edit go (paper, Table 2).
REFERENCE_PATHS = ("both", "mllm", "dit")


@dataclasses.dataclass(frozen=True, eq=False)
class MetaQueryConditioner:
    """Prompts and source images to (context, pooled).

    `tokenize` is host work; `apply` is pure and may be jitted. `params` of `apply` is `{'vlm': ..., 'conditioner': ...}`,
    the names of the folders.

    Attributes:
      vlm: the vision-language model, which only reads.
      connector: queries and connector.
      processor: prepares conversations.
      positions: '1d', as the released weights are used, or 'mrope', as the training code of their lineage does.
      vision_scale: edges of what the tower sees, in parts of the image's.
      max_sequence_length: room for a prompt's text with its template; None: the next of a few sizes.
      edit_negative: what an edit's unconditional branch is told; by default what the published script says.
      reference_path: where the pictures of an edit go: to the vision-language model ('mllm'), as latents into the transformer ('dit'),
        or, as in the released model, to 'both'.
    """

    vlm: Qwen2_5_VL
    connector: MetaQuery
    processor: VLMProcessor
    positions: str = "1d"
    vision_scale: float = VISION_SCALE
    max_sequence_length: int | None = None
    edit_negative: str = EDIT_NEGATIVE
    reference_path: str = "both"

    reads_images: ClassVar[bool] = True
    own_sizes: ClassVar[bool] = False
    SETTINGS: ClassVar[tuple[str, ...]] = (
        "positions",
        "vision_scale",
        "max_sequence_length",
        "edit_negative",
        "reference_path",
    )

    def __post_init__(self) -> None:
        ours, theirs = self.connector.config.llm_hidden_size, self.vlm.config.hidden_size
        if ours != theirs:
            raise ValueError(
                f"The conditioner reads states of {ours} channels but the vision-language model gives {theirs}; they are from "
                "different models."
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; choose one of {', '.join(POSITIONS)}.")
        if self.reference_path not in REFERENCE_PATHS:
            raise ValueError(f"reference_path is {self.reference_path!r}; choose one of {', '.join(REFERENCE_PATHS)}.")

    @property
    def latent_references(self) -> bool:
        """Whether the transformer attends to the pictures of an edit."""
        return self.reference_path != "mllm"

    @property
    def joint_attention_dim(self) -> int:
        """Width of the context, J."""
        return self.connector.config.joint_attention_dim

    @property
    def context_length(self) -> int:
        """Tokens of the context, S: the queries."""
        return self.connector.config.num_queries

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector, P."""
        return self.connector.config.pooled_projection_dim

    @property
    def description(self) -> str:
        """The vision-language model's and the connector's sizes."""
        layers, queries = self.vlm.config.num_hidden_layers, self.context_length
        return f"MetaQuery (Qwen2.5-VL of {layers} layers, {queries} queries)"

    def default_negative(self, is_edit: bool) -> str:
        """Nothing for text-to-image, `edit_negative` for edits."""
        return self.edit_negative if is_edit else ""

    @property
    def modules(self) -> dict[str, Any]:
        """The networks by folder."""
        return {"conditioner": self.connector, "vlm": self.vlm}

    def tokenize(self, prompts: Sequence[str] | str, images: Sequence[Sequence[Any]] | None = None) -> VLMInput:
        """Conversations for the prompts: `Generate an image: ...`, or the images and the raw instruction.

        Args:
          images: for each prompt the pictures that it edits, of the size that is made; see `pictures.decode.to_pil`. A prompt
            without one is text-to-image.

        Raises:
          ValueError: when the pictures have several sizes, or a prompt is longer than max_sequence_length.
        """
        prompts = check_prompts(prompts)
        rows = [[to_pil(picture) for picture in row] for row in images or [[]] * len(prompts)]
        if len(rows) != len(prompts):
            raise ValueError(f"There are images for {len(rows)} prompts of {len(prompts)}; give one entry for each.")
        texts = [text if row else T2I_TEMPLATE.format(prompt=text) for row, text in zip(rows, prompts)]
        rows = rows if self.reference_path != "dit" else [[] for _ in prompts]
        sizes = {picture.size for row in rows for picture in row}
        if len(sizes) > 1:
            raise ValueError(f"The images of a batch have {len(sizes)} sizes; resize them to the target's first.")
        pixels = math.prod(edge * self.vision_scale for edge in sizes.pop()) if sizes else None
        return self.processor(
            [[user_message(row, text)] for row, text in zip(rows, texts)],
            system_prompt=False,
            mrope=self.positions == "mrope",
            pixels=pixels,
            text_length=self.max_sequence_length,
            # Pictures are of the size that is made, for which there is a program anyhow.
            in_program=range(max(map(len, rows), default=0)),
        )

    def apply(self, params: dict[str, Any], tokens: VLMInput) -> tuple[jax.Array, jax.Array]:
        """Encodes what `tokenize` gave: context [B, S, J] and pooled [B, P].

        The prompt is read first, then the queries over its cache: nothing that is learned comes before the queries, so
        training goes back through their few places only.
        """
        vlm, connector = {"params": params["vlm"]}, {"params": params["conditioner"]}
        (batch, length), count = tokens.input_ids.shape, self.context_length
        decode = functools.partial(self.vlm.apply, vlm, method="decode")
        embeddings = self.vlm.apply(vlm, tokens.input_ids, tokens.vision, method="embed")
        queries = self.connector.apply(connector, batch, method="queries").astype(embeddings.dtype)
        # The queries are ordinary places behind the prompt.
        before = rearrange(jnp.asarray(tokens.positions), "b three t -> three b t")
        following = before.max(axis=(0, 2))[:, None] + 1 + jnp.arange(count)
        valid = jnp.concatenate([tokens.valid, jnp.ones((batch, count), bool)], axis=-1)
        cache = init_cache(self.vlm.config, batch, length + count, self.vlm.dtype)
        _, cache = decode(embeddings, before, valid, cache, 0)
        hidden, _ = decode(queries, jnp.broadcast_to(following, (3, batch, count)), valid, cache, length)
        return self.connector.apply(connector, hidden)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters of both networks."""
        keys = jax.random.split(key)
        states = jnp.zeros((1, self.context_length, self.connector.config.llm_hidden_size))
        return {
            "conditioner": self.connector.init(keys[0], states)["params"],
            "vlm": self.vlm.init(keys[1], *example_inputs(self.vlm.config))["params"],
        }

    def save_tokenizers(self, folder: str | os.PathLike) -> None:
        """Writes the processor into `vlm/`."""
        self.processor.save(Path(folder) / "vlm")
