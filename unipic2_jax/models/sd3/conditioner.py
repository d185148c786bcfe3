"""What the MMDiT is conditioned on: the interface of a conditioner, and SD3's, which is three text encoders."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unipic2_jax.models.conditioner import check_prompts
from unipic2_jax.models.sd3.clip import CLIPTextModelWithProjection
from unipic2_jax.models.sd3.t5 import T5Encoder
from unipic2_jax.models.tokenizer_files import save_tokenizer

logger = logging.getLogger(__name__)

# What the published scripts tell the unconditional branch of an edit, whichever conditioner the model has.
EDIT_NEGATIVE = (
    "blurry, low quality, low resolution, distorted, deformed, broken content, missing parts, damaged details, artifacts, "
    "glitch, noise, pixelated, grainy, compression artifacts, bad composition, wrong proportion, incomplete editing, "
    "unfinished, unedited areas."
)
# Tokenizers without a length of their own report a number of this order.
_UNBOUNDED = 10**6


@dataclasses.dataclass(frozen=True, eq=False)
class TextConditioner:
    """Prompts to (context, pooled), equal to `StableDiffusion3Pipeline.encode_prompt` of diffusers.

    `tokenize` is host work on strings; `apply` is pure and may be jitted. `params` of `apply` is
    `{'text_encoder': ..., 'text_encoder_2': ..., 'text_encoder_3': ...}`, the folder names of diffusers.

    Attributes:
      clip_l, clip_g: the two CLIP encoders; their state widths are concatenated.
      t5: the T5 encoder, or None to run without it: its part of the context is then zeros, as in diffusers.
      tokenizer, tokenizer_2, tokenizer_3: transformers tokenizers of the three; tokenizer_3 is None with t5.
      max_sequence_length: tokens of T5 in the context.
      joint_attention_dim: width of the context, J.
      edit_negative: what an edit's unconditional branch is told; by default what the published script says.
    """

    clip_l: CLIPTextModelWithProjection
    clip_g: CLIPTextModelWithProjection
    t5: T5Encoder | None
    tokenizer: Any
    tokenizer_2: Any
    tokenizer_3: Any
    max_sequence_length: int = 256
    joint_attention_dim: int = 4096
    edit_negative: str = EDIT_NEGATIVE

    reads_images: ClassVar[bool] = False
    own_sizes: ClassVar[bool] = False
    latent_references: ClassVar[bool] = True
    SETTINGS: ClassVar[tuple[str, ...]] = ("max_sequence_length", "edit_negative")

    def __post_init__(self) -> None:
        if (self.t5 is None) != (self.tokenizer_3 is None):
            raise ValueError("T5 and tokenizer_3 belong together; give both or neither.")
        if self.t5 is not None and self.t5.config.d_model != self.joint_attention_dim:
            raise ValueError(
                f"T5 is {self.t5.config.d_model} wide but joint_attention_dim is {self.joint_attention_dim}; "
                "make them equal."
            )
        clip_width = self.clip_l.config.hidden_size + self.clip_g.config.hidden_size
        if clip_width > self.joint_attention_dim:
            raise ValueError(
                f"Both CLIP states together are {clip_width} wide, which exceeds joint_attention_dim "
                f"{self.joint_attention_dim}; widen it."
            )
        for name, tokenizer, module in (
            ("tokenizer", self.tokenizer, self.clip_l),
            ("tokenizer_2", self.tokenizer_2, self.clip_g),
            ("tokenizer_3", self.tokenizer_3, self.t5),
        ):
            # An id beyond the table would be clamped, not reported, by a gather on an accelerator.
            if module is not None and len(tokenizer) > module.config.vocab_size:
                raise ValueError(
                    f"{name} has {len(tokenizer)} tokens but its encoder knows {module.config.vocab_size}; "
                    "use the tokenizer that belongs to the encoder."
                )
            if module in (self.clip_l, self.clip_g) and self.clip_length > module.config.max_position_embeddings:
                raise ValueError(
                    f"tokenizer's model_max_length is {self.clip_length} but the encoder of {name} has "
                    f"{module.config.max_position_embeddings} positions; set model_max_length in tokenizer_config.json."
                )

    @property
    def clip_length(self) -> int:
        """Tokens of CLIP in the context: the first tokenizer's length rules both, as in diffusers."""
        return int(min(self.tokenizer.model_max_length, _UNBOUNDED))

    @property
    def context_length(self) -> int:
        """Tokens of the context, S."""
        return self.clip_length + self.max_sequence_length

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector, P."""
        return self.clip_l.config.projection_dim + self.clip_g.config.projection_dim

    @property
    def description(self) -> str:
        """The encoders."""
        return f"text encoders (CLIP, CLIP{'' if self.t5 is None else ', T5'})"

    def default_negative(self, is_edit: bool) -> str:
        """Nothing for text-to-image, as in diffusers; `edit_negative` for edits."""
        return self.edit_negative if is_edit else ""

    @property
    def modules(self) -> dict[str, Any]:
        """The encoders by folder."""
        modules = {"text_encoder": self.clip_l, "text_encoder_2": self.clip_g, "text_encoder_3": self.t5}
        return {name: module for name, module in modules.items() if module is not None}

    def tokenize(
        self, prompts: Sequence[str] | str, images: Sequence[Sequence[Any]] | None = None
    ) -> dict[str, np.ndarray]:
        """Prompts to int32 ids: 'clip_l' and 'clip_g' [B, clip_length], and with T5 't5' [B, max_sequence_length].

        Prompts that do not fit are cut with a warning. Text encoders do not see `images`.

        Raises:
          TypeError: when a prompt is not a string.
        """
        del images
        prompts = check_prompts(prompts)
        tokens = {
            "clip_l": _padded_ids(self.tokenizer, prompts, self.clip_length, "tokenizer"),
            "clip_g": _padded_ids(self.tokenizer_2, prompts, self.clip_length, "tokenizer_2"),
        }
        if self.t5 is not None:
            tokens["t5"] = _padded_ids(self.tokenizer_3, prompts, self.max_sequence_length, "tokenizer_3")
        return tokens

    def apply(self, params: dict[str, Any], tokens: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Encodes what `tokenize` gave.

        Returns:
          context [B, S, J]: CLIP states side by side, zero-padded to J, then T5 states; and pooled [B, P]: both
          projections side by side.
        """
        states_l, pooled_l = self.clip_l.apply({"params": params["text_encoder"]}, tokens["clip_l"])
        states_g, pooled_g = self.clip_g.apply({"params": params["text_encoder_2"]}, tokens["clip_g"])
        clip = jnp.concatenate([states_l, states_g], axis=-1)
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, self.joint_attention_dim - clip.shape[-1])))
        if self.t5 is None:
            t5 = jnp.zeros((clip.shape[0], self.max_sequence_length, self.joint_attention_dim), clip.dtype)
        else:
            t5 = self.t5.apply({"params": params["text_encoder_3"]}, tokens["t5"])
        return jnp.concatenate([clip, t5], axis=1), jnp.concatenate([pooled_l, pooled_g], axis=-1)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters of the encoders, for training from scratch."""
        clip_ids = jnp.zeros((1, self.clip_length), jnp.int32)
        keys = jax.random.split(key, 3)
        params = {
            "text_encoder": self.clip_l.init(keys[0], clip_ids)["params"],
            "text_encoder_2": self.clip_g.init(keys[1], clip_ids)["params"],
        }
        if self.t5 is not None:
            t5_ids = jnp.zeros((1, self.max_sequence_length), jnp.int32)
            params["text_encoder_3"] = self.t5.init(keys[2], t5_ids)["params"]
        return params

    def save_tokenizers(self, folder: str | Path) -> None:
        """Writes `tokenizer/`, `tokenizer_2/` and, with T5, `tokenizer_3/` into `folder` in Hugging Face format."""
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            if (tokenizer := getattr(self, name)) is not None:
                save_tokenizer(tokenizer, Path(folder) / name)


def load_tokenizers(folder: str | Path) -> dict[str, Any]:
    """Reads `tokenizer`, `tokenizer_2` and `tokenizer_3` (None when its folder is absent) of a diffusers SD3 folder.

    Raises:
      FileNotFoundError: when a CLIP tokenizer's folder is missing.
    """
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder = Path(folder)
    for name in ("tokenizer", "tokenizer_2"):
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name} is missing; a diffusers SD3 folder holds both CLIP tokenizers.")
    third = folder / "tokenizer_3"
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        "tokenizer_3": T5TokenizerFast.from_pretrained(third) if third.is_dir() else None,
    }


def _padded_ids(tokenizer: Any, prompts: list[str], length: int, name: str) -> np.ndarray:
    out = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    full = [prompt for prompt, mask in zip(prompts, out["attention_mask"]) if mask.all()]
    cut = [prompt for prompt in full if len(tokenizer(prompt, verbose=False)["input_ids"]) > length]
    if cut:
        logger.warning("%s keeps %d tokens; %d prompt(s) were cut, first: %.80r", name, length, len(cut), cut[0])
    return out["input_ids"].astype(np.int32)
