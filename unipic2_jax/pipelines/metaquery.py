"""MetaQuery's conditioner: a frozen Qwen2.5-VL reads the prompt, and for an edit the image, and learned queries behind it.

Original: UniPic 2.0's scripts `unipic2_mq_t2i.py` and `unipic2_mq_editing.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unipic2_jax.models.connector import MetaQuery
from unipic2_jax.models.qwen import Qwen2_5_VL
from unipic2_jax.pipelines.images import to_pil
from unipic2_jax.pipelines.vlm import VLMInput, VLMProcessor

T2I_TEMPLATE = "Generate an image: {prompt}"
# The tower sees an edit's image at this part of its edges: one merged token of 28 pixels for 32 of the image.
VISION_SCALE = 28 / 32
POSITIONS = ("1d", "mrope")


@dataclasses.dataclass(frozen=True, eq=False)
class MetaQueryConditioner:
    """Prompts and source images to (context, pooled).

    `tokenize` is host work; `apply` is pure and may be jitted. `params` of `apply` is `{'vlm': ..., 'connector': ...}`.

    Attributes:
      vlm: the language model, which only reads.
      connector: queries and connector.
      processor: prepares conversations.
      positions: '1d', as the released weights are used, or 'mrope', as the training code of their lineage does.
      vision_scale: edges of what the tower sees, in parts of the image's.
    """

    vlm: Qwen2_5_VL
    connector: MetaQuery
    processor: VLMProcessor
    positions: str = "1d"
    vision_scale: float = VISION_SCALE

    def __post_init__(self) -> None:
        ours, theirs = self.connector.config.llm_hidden_size, self.vlm.config.hidden_size
        if ours != theirs:
            raise ValueError(
                f"The conditioner reads states of {ours} channels but the language model gives {theirs}; they are from "
                "different models."
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; choose one of {', '.join(POSITIONS)}.")

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

    def tokenize(self, prompts: Sequence[str] | str, images: Sequence[Any] | None = None) -> VLMInput:
        """Conversations for the prompts: `Generate an image: ...`, or the image and the raw instruction.

        Args:
          images: one picture a prompt (or a list of several), all or none; see `images.to_pil`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"A prompt must be a string but one is {type(prompt).__name__}; pass text.")
        options = {"system_prompt": False, "mrope": self.positions == "mrope"}
        if images is None:
            texts = (T2I_TEMPLATE.format(prompt=prompt) for prompt in prompts)
            return self.processor([[_message([], text)] for text in texts], **options)
        rows = [[to_pil(p) for p in (row if isinstance(row, (list, tuple)) else [row])] for row in images]
        if len(rows) != len(prompts):
            raise ValueError(f"There are {len(rows)} images for {len(prompts)} prompts; give one for each.")
        sizes = {picture.size for row in rows for picture in row}
        if len(sizes) > 1:
            raise ValueError(f"The images of a batch have {len(sizes)} sizes; resize them to the target's first.")
        width, height = sizes.pop()
        pixels = (height * self.vision_scale) * (width * self.vision_scale)
        return self.processor([[_message(row, text)] for row, text in zip(rows, prompts)], pixels=pixels, **options)

    def apply(self, params: dict[str, Any], tokens: VLMInput) -> tuple[jax.Array, jax.Array]:
        """Encodes what `tokenize` gave: context [B, S, J] and pooled [B, P]."""
        vlm, connector = {"params": params["vlm"]}, {"params": params["connector"]}
        batch, count = tokens.input_ids.shape[0], self.context_length
        embeddings = self.vlm.apply(vlm, tokens.input_ids, tokens.vision, method="embed")
        queries = self.connector.apply(connector, batch, method="queries").astype(embeddings.dtype)
        # The queries are ordinary places behind the prompt.
        following = jnp.max(jnp.asarray(tokens.positions), axis=(0, 2))[:, None] + 1 + jnp.arange(count)
        positions = jnp.concatenate([tokens.positions, jnp.broadcast_to(following, (3, batch, count))], axis=-1)
        valid = jnp.concatenate([tokens.valid, jnp.ones((batch, count), bool)], axis=-1)
        hidden, _ = self.vlm.apply(
            vlm, jnp.concatenate([embeddings, queries], axis=1), positions, valid, method="decode"
        )
        return self.connector.apply(connector, hidden[:, -count:])


def _message(pictures: Sequence[Any], text: str) -> dict[str, Any]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}
