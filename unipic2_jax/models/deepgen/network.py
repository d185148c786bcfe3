"""DeepGen 1.0's two own networks: a connector over several layers' states, and a low-rank update of the vision-language model.

Original: deepgenteam/deepgen, `qwen2_5_vl_sd3_hf_dynamic_fusion.py` and `configs/models/deepgen_scb.py` (report, "stacked channel
bridging"). The connector is MetaQuery's with a wider first projection: it reads the states of `fused_layers` side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.lora import scaled
from unipic2_jax.models.metaquery.connector import ConnectorConfig, MetaQueryConfig
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig


@dataclasses.dataclass(frozen=True)
class DeepGenConfig(MetaQueryConfig):
    """Sizes of queries and connector; the defaults are DeepGen 1.0's. Its network is `MetaQuery`.

    Attributes:
      fused_layers: whose states are read, in the order in which they stand side by side; counted as transformers' `hidden_states`
        counts. The original takes every sixth from the last but one.

    Raises:
      ValueError: at construction, when there is no layer to read.
    """

    CLASS_NAME = "DeepGenConditioner"

    num_queries: int = 128
    llm_hidden_size: int = 2048
    connector_config: ConnectorConfig = dataclasses.field(
        default_factory=lambda: ConnectorConfig(2048, 11946, num_hidden_layers=6, num_attention_heads=32)
    )
    fused_layers: tuple[int, ...] = (35, 29, 23, 17, 11, 5)

    def __post_init__(self) -> None:
        if not self.fused_layers:
            raise ValueError("fused_layers names no layer whose states the connector reads; give at least one.")

    @property
    def read_size(self) -> int:
        """Channels that the connector reads at a place."""
        return len(self.fused_layers) * self.llm_hidden_size


@dataclasses.dataclass(frozen=True)
class DecoderLoRAConfig(ModelConfig):
    """Sizes of an update of Qwen2.5-VL's decoder; the defaults are DeepGen's, of the 3B model.

    Attributes:
      r, lora_alpha: as peft names them; the update is scaled by lora_alpha / r.
      key_value_size: channels of all keys of a place.

    Raises:
      ValueError: at construction, for a rank below 1.
    """

    CLASS_NAME = "Qwen2_5_VLDecoderLoRA"

    r: int = 64
    lora_alpha: float = 128.0
    hidden_size: int = 2048
    intermediate_size: int = 11008
    key_value_size: int = 256
    num_hidden_layers: int = 36

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"The rank r of the vision-language model's LoRA is {self.r}; it must be at least 1.")

    @classmethod
    def of(cls, vlm: Qwen2_5_VLConfig, r: int = 64, lora_alpha: float = 128.0) -> DecoderLoRAConfig:
        """The sizes that an update of this vision-language model has."""
        narrow = vlm.num_key_value_heads * vlm.head_dim
        return cls(r, lora_alpha, vlm.hidden_size, vlm.intermediate_size, narrow, vlm.num_hidden_layers)

    def matrices(self) -> Iterator[tuple[str, str, int, int]]:
        """(part of a layer, its matrix, channels in, channels out) of every matrix that is updated."""
        wide, narrow, inner = self.hidden_size, self.key_value_size, self.intermediate_size
        attention = {"q_proj": (wide, wide), "k_proj": (wide, narrow), "v_proj": (wide, narrow), "o_proj": (wide, wide)}
        mlp = {"gate_proj": (wide, inner), "up_proj": (wide, inner), "down_proj": (inner, wide)}
        for part, sizes in {"self_attn": attention, "mlp": mlp}.items():
            yield from ((part, name, *size) for name, size in sizes.items())


class DecoderLoRA(nn.Module):
    """A low-rank update of every matrix of the decoder's layers, as a network of its own: its parameters are all that it is.

    New ones change nothing yet: A ~ N(0, (1 / r)^2), B = 0, as the original starts. Its dropout of 0.05 on the update's input is
    left out, since a conditioner draws nothing at random.
    """

    config: DecoderLoRAConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """What `Qwen2_5_VL` takes as the collection 'lora', scaled by lora_alpha / r."""
        layers = self.param("layers", self._new)
        return scaled({"layers": layers}, self.config.lora_alpha / self.config.r)

    def _new(self, key: jax.Array) -> dict[str, Any]:
        """{'self_attn': {'q_proj': {'a': [L, in, r], 'b': [L, r, out]}, ...}, 'mlp': ...} of all L layers."""
        count, rank = self.config.num_hidden_layers, self.config.r
        layers: dict[str, Any] = {}
        for index, (part, name, size_in, size_out) in enumerate(self.config.matrices()):
            drawn = jax.random.normal(jax.random.fold_in(key, index), (count, size_in, rank), self.param_dtype)
            zeros = jnp.zeros((count, rank, size_out), self.param_dtype)
            layers.setdefault(part, {})[name] = {"a": drawn / rank, "b": zeros}
        return layers
