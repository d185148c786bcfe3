"""Qwen2.5-VL: a decoder over text in which images stand as tokens of its vision tower.

Original: `transformers.Qwen2_5_VLForConditionalGeneration`. Rows of a batch are padded on the left, so that all of them
end at the same place and continue together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn

from unipic2_jax.core.fields import check_fields, hints
from unipic2_jax.models.attention import attention
from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.lora import LoRADense
from unipic2_jax.models.qwen.vision import (
    KERNEL_INIT,
    GatedMLP,
    Qwen2_5_VLVisionConfig,
    VisionInput,
    VisionTokens,
    VisionTower,
    rotate,
)
from unipic2_jax.models.remat import stacked
from unipic2_jax.parallel.rules import constrain

# Keys and values of the places seen so far: {'key': [L, B, T, KV, D], 'value': the same}.
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLConfig(ModelConfig):
    """Sizes under transformers' field names; the defaults are the 7B model.

    Raises:
      ValueError: at construction, when the fields contradict each other.
    """

    CLASS_NAME = "Qwen2_5_VLForConditionalGeneration"
    MODEL_TYPE = "qwen2_5_vl"
    FOREIGN: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("text_config", "rope_parameters", "rope_scaling"), Mapping | None),
        "use_sliding_window": bool | None,
    }

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 128000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_config: Qwen2_5_VLVisionConfig = dataclasses.field(default_factory=Qwen2_5_VLVisionConfig)

    def __post_init__(self) -> None:
        if self.hidden_act != "silu":
            raise ValueError(f"Qwen2.5-VL's hidden_act {self.hidden_act!r} is not supported; use 'silu'.")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, {self.num_attention_heads} heads and {self.num_key_value_heads} "
                "key-value heads must each be a multiple of the next; change one of them."
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {self.mrope_section} must be three numbers that sum to half of the heads' "
                f"{self.head_dim} channels."
            )
        if self.vision_config.out_hidden_size != self.hidden_size:
            raise ValueError(
                f"The vision tower gives tokens of {self.vision_config.out_hidden_size} channels but the language model "
                f"takes {self.hidden_size}; these parts are from different models."
            )

    @classmethod
    def adapted(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The flat files of the hub and the nested ones of transformers 5.

        Raises:
          ValueError: for what is not supported: sliding windows, and rotary positions that are scaled.
        """
        nested = values.get("text_config") or {}
        check_fields({**hints(cls), **cls.FOREIGN}, nested, "text_config.")
        tied = any(side.get("tie_word_embeddings", False) for side in (values, nested))
        values = {**values, **nested, "tie_word_embeddings": tied}
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise ValueError(f"Rotary positions of type {kind!r} are not supported; only the unscaled ones are.")
        if values.get("use_sliding_window"):
            raise ValueError("use_sliding_window is not supported; no released Qwen2.5-VL sets it.")
        return {**values, **{k: rope[k] for k in ("rope_theta", "mrope_section") if k in rope}}

    def to_dict(self) -> dict[str, Any]:
        """The flat layout of the hub, which every version of transformers reads."""
        values = {**super().to_dict(), "vision_config": self.vision_config.to_dict()}
        section = values.pop("mrope_section")
        vision = {"model_type": self.vision_config.MODEL_TYPE, "in_chans": self.vision_config.in_channels}
        values["vision_config"] = {**vision, **values["vision_config"]}
        return {**values, "rope_scaling": {"type": "mrope", "mrope_section": list(section)}}

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads


QWEN2_5_VL_7B = Qwen2_5_VLConfig()
QWEN2_5_VL_3B = Qwen2_5_VLConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    vision_config=Qwen2_5_VLVisionConfig(out_hidden_size=2048),
)


def text_positions(valid: np.ndarray) -> np.ndarray:
    """1-D positions as the three of M-RoPE, int [3, B, T]: each row counts its own tokens, padding gets 0."""
    count = np.maximum(np.cumsum(np.asarray(valid, bool), axis=-1) - 1, 0).astype(np.int32)
    return np.broadcast_to(np.where(valid, count, 0), (3, *count.shape))


def mrope_positions(
    config: Qwen2_5_VLConfig,
    input_ids: np.ndarray,
    valid: np.ndarray,
    image_grid_thw: Sequence[Sequence[int]] | np.ndarray = (),
    video_grid_thw: Sequence[Sequence[int]] = (),
    second_per_grid_ts: Sequence[float] | None = None,
) -> np.ndarray:
    """Frame, row and column of every token, int [3, B, T] (transformers' `get_rope_index`).

    Text counts on in all three; an image starts where the text before it ended and the text after it continues behind
    its longer edge. Padding gets 0.

    Args:
      input_ids, valid: int and bool [B, T].
      image_grid_thw, video_grid_thw: (frames, height, width) in patches of the images and of the videos, in the order in
        which the batch names them.
      second_per_grid_ts: seconds between the frames of each video; 1 by default.
    """
    merge = config.vision_config.spatial_merge_size
    seconds = iter(np.ones(len(video_grid_thw)) if second_per_grid_ts is None else second_per_grid_ts)
    grids = {config.image_token_id: iter(image_grid_thw), config.video_token_id: iter(video_grid_thw)}
    positions = np.zeros((3, *input_ids.shape), np.int32)
    for row, mask in enumerate(np.asarray(valid, bool)):
        ids = input_ids[row][mask]
        pieces, start, place = [], 0, 0
        while place < len(ids):
            token = int(ids[place])
            if token in grids:
                frames, height, width = (int(n) for n in next(grids[token]))
                height, width = height // merge, width // merge
                here = np.stack(np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij"))
                if token == config.video_token_id:
                    interval = config.vision_config.tokens_per_second * next(seconds)
                    here[0] = (here[0] * interval).astype(int)
                here, ahead = here.reshape(3, -1), max(height, width)
            else:
                behind = np.flatnonzero(np.isin(ids[place:], list(grids)))
                ahead = int(behind[0]) if len(behind) else len(ids) - place
                here = np.broadcast_to(np.arange(ahead), (3, ahead))
            pieces.append(start + here)
            start, place = start + ahead, place + here.shape[1]
        positions[:, row, mask] = np.concatenate(pieces, axis=1)[:, : len(ids)] if pieces else 0
    return positions


def example_inputs(config: Qwen2_5_VLConfig) -> tuple[Any, ...]:
    """The smallest arguments of `Qwen2_5_VL` that reach every parameter: one token, one window."""
    tower = config.vision_config
    window = jnp.zeros((1, 1, tower.window_slots), jnp.int32)
    ids = jnp.zeros((1, 1), jnp.int32)
    vision = VisionInput(jnp.zeros((*window.shape, tower.patch_dim)), jnp.stack([window, window], axis=-1), window, ids)
    return ids, jnp.zeros((3, 1, 1), jnp.int32), jnp.ones((1, 1), bool), vision


def init_cache(config: Qwen2_5_VLConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `length` places."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


class QwenAttention(nn.Module):
    """Grouped-query causal self-attention, [B, S, D] -> [B, S, D].

    Attributes:
      still_padding: a place that sees nothing, which is padding, gets zero (as flash attention gives it) instead of anything at all.
    """

    config: Qwen2_5_VLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    still_padding: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, angle: jax.Array, mask: jax.Array, cache: Cache | None, index: jax.Array | int
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(LoRADense, kernel_init=KERNEL_INIT, **kinds)

        def heads(count: int, name: str) -> jax.Array:
            return dense(count * c.head_dim, name=name)(x).reshape(*x.shape[:2], count, c.head_dim)

        query = rotate(heads(c.num_attention_heads, "q_proj"), angle)
        key, value = rotate(heads(c.num_key_value_heads, "k_proj"), angle), heads(c.num_key_value_heads, "v_proj")
        if cache is not None:
            put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)
            cache = {"key": put(cache["key"], key), "value": put(cache["value"], value)}
            cache = {name: constrain(x, "batch", None, "heads", None) for name, x in cache.items()}
            key, value = cache["key"].astype(key.dtype), cache["value"].astype(value.dtype)
        # The queries that share a key stand beside each other as more queries: keys and values are never repeated.
        groups = c.num_attention_heads // c.num_key_value_heads
        grouped = rearrange(query, "b s (k g) d -> b (s g) k d", g=groups)
        wide = repeat(mask, "b n s t -> b n (s g) t", g=groups)
        mixed = attention(grouped, key, value, mask=wide, network="Qwen2.5-VL")
        mixed = rearrange(mixed, "b (s g) k d -> b s (k g d)", g=groups)
        if self.still_padding:
            mixed = jnp.where(mask.any(axis=-1)[:, 0, :, None], mixed, 0)
        return dense(c.hidden_size, use_bias=False, name="o_proj")(mixed), cache


class QwenLayer(nn.Module):
    """A pre-norm decoder block: the new states, and (the cache, the states that it read where `keep` asks for them)."""

    config: Qwen2_5_VLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    keep: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, angle: jax.Array, mask: jax.Array, index: jax.Array | int
    ) -> tuple[jax.Array, tuple[Cache | None, jax.Array | None]]:
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.RMSNorm, epsilon=c.rms_norm_eps, **kinds)
        attend = QwenAttention(c, **kinds, still_padding=self.keep, name="self_attn")
        read = x = constrain(x, "batch", "sequence", None)
        mixed, cache = attend(norm(name="input_layernorm")(x), angle, mask, cache, index)
        x = x + mixed
        mlp = GatedMLP(c.intermediate_size, False, **kinds, name="mlp")
        return x + mlp(norm(name="post_attention_layernorm")(x)), (cache, read if self.keep else None)


class Qwen2_5_VL(nn.Module):
    """The whole model. Parameters of the layers, in the tower as in the decoder, are stacked along their leading axis.

    Attributes:
      remat: what of a layer is kept for the backward pass, see `models.remat`.
      states: which states `decode` gives, side by side, instead of the last: as transformers' `hidden_states` counts them, 0 is
        what the first layer reads. Parameters do not depend on it.
    """

    config: Qwen2_5_VLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    states: tuple[int, ...] = ()

    def setup(self) -> None:
        c = self.config
        if wrong := [number for number in self.states if not 0 <= number < c.num_hidden_layers]:
            raise ValueError(
                f"The states of layer {wrong[0]} are asked of a language model whose {c.num_hidden_layers} layers read states 0 to "
                f"{c.num_hidden_layers - 1}; they are of different models."
            )
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.visual = VisionTower(c.vision_config, **kinds, remat=self.remat)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        layers = stacked(QwenLayer, self.remat, c.num_hidden_layers, in_axes=in_axes)
        self.layers = layers(c, **kinds, keep=bool(self.states))
        self.norm = nn.RMSNorm(epsilon=c.rms_norm_eps, **kinds)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=KERNEL_INIT, **kinds)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        vision: VisionInput | VisionTokens | None = None,
    ) -> jax.Array:
        """Token ids [B, T] and their images to the last hidden states [B, T, D], after the final norm.

        Args: see `embed` and `decode`.
        """
        hidden, _ = self.decode(self.embed(input_ids, vision), positions, valid)
        if self.is_initializing():
            self.logits(hidden)
        return hidden

    def embed(self, input_ids: jax.Array, vision: VisionInput | VisionTokens | None = None) -> jax.Array:
        """Token embeddings [B, T, D], with the merged tokens of the images where `vision` puts them."""
        x = self.embed_tokens(input_ids)
        if vision is None:
            return x
        tokens = vision.tokens[..., None]
        features = vision.features if isinstance(vision, VisionTokens) else self.visual(vision)
        images = jnp.take_along_axis(features, jnp.maximum(tokens, 0), axis=1)
        return jnp.where(tokens >= 0, images.astype(x.dtype), x)

    def decode(
        self,
        embeddings: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: Cache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          embeddings: [B, S, D].
          positions: int [3, B, S], from `text_positions` or `mrope_positions`.
          valid: bool [B, T], which places hold a token; T = S without a cache, else the cache's length.
          cache: from `init_cache` or an earlier call; None: nothing came before and nothing will follow.
          index: the place of the first of these tokens in the cache.

        Returns:
          hidden states [B, S, D] after the final norm, or [B, S, n D] of the n `states`, and the cache with these tokens in it.
        """
        c = self.config
        frequencies = c.rope_theta ** -(np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)
        # Which of the three positions turns each frequency.
        which = np.repeat(np.arange(3), c.mrope_section)
        angle = positions.astype(jnp.float32)[which] * frequencies[:, None, None]
        angle = rearrange(angle, "f b s -> b s 1 f")
        places = jnp.arange(valid.shape[1])
        seen = places[None, :] <= index + jnp.arange(embeddings.shape[1])[:, None]
        mask = (valid.astype(bool)[:, None, :] & seen)[:, None]
        x, (cache, read) = self.layers(embeddings.astype(self.dtype), cache, angle, mask, index)
        if self.states:
            return jnp.concatenate([read[number] for number in self.states], axis=-1), cache
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to float32 logits [..., V]."""
        head = self.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        return head(hidden).astype(jnp.float32)
