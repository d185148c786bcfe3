"""EditReward: Qwen2.5-VL reads source, edited picture and instruction; a linear head turns its last state into scores.

After Skywork-EditReward (paper, section 3.2: Qwen2.5-VL-7B, supervised regression on a judge's scores); how the head is made
is not published. Trained is either everything or, as the collection 'lora', a low-rank update of the decoder and the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from unipic2_jax.models.lora import rank_of, scaled
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL, Qwen2_5_VLConfig
from unipic2_jax.models.qwen.vision import VisionInput, VisionTokens

DEFAULT_TARGETS = ("instruction", "quality")
# The matrices of every decoder layer that LoRA updates; the vision tower stays as it is.
LORA_TARGETS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class EditReward(nn.Module):
    """The whole network; parameters are {'vlm', 'head'}, a LoRA tree is {'vlm'}.

    Attributes:
      targets: how many scores.
      dtype, param_dtype: of the vision-language model; the head computes in float32.
      remat: as of `Qwen2_5_VL`.
      lora_alpha: of the LoRA; its update is scaled by lora_alpha / rank.
    """

    config: Qwen2_5_VLConfig
    targets: int = len(DEFAULT_TARGETS)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    lora_alpha: float = 64.0

    def setup(self) -> None:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.vlm = Qwen2_5_VL(self.config, **kinds, remat=self.remat)
        self.head = nn.Dense(self.targets, kernel_init=nn.initializers.zeros)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        vision: VisionInput | VisionTokens | None = None,
    ) -> jax.Array:
        """Prompts that end at the last place (`Qwen2_5_VL.__call__`) to scores float32 [B, targets] in [0, 1]."""
        hidden = self.vlm(input_ids, positions, valid, vision)[:, -1]
        return nn.sigmoid(self.head(hidden.astype(jnp.float32)))

    def look(self, vision: VisionInput) -> VisionTokens:
        """What the vision tower makes of pictures, to be given instead of them."""
        return VisionTokens(self.vlm.visual(vision), vision.tokens)


def lora_shapes(config: Qwen2_5_VLConfig, rank: int) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """(part of a layer, matrix, shape of A, shape of B) of every updated stack of matrices."""
    width, hidden = config.hidden_size, config.intermediate_size
    narrow = config.num_key_value_heads * config.head_dim
    sizes = {
        **{"q_proj": (width, width), "o_proj": (width, width), "k_proj": (width, narrow), "v_proj": (width, narrow)},
        **{"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)},
    }
    layers = config.num_hidden_layers
    for part, names in LORA_TARGETS.items():
        for name in names:
            yield part, name, (layers, sizes[name][0], rank), (layers, rank, sizes[name][1])


def init_lora(key: jax.Array, config: Qwen2_5_VLConfig, rank: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """An update of the decoder that changes nothing yet: A uniform within sqrt(3 / inputs), as of a new layer, and B = 0.

    Raises:
      ValueError: for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank} must be at least 1.")
    layers: dict[str, dict[str, Any]] = {}
    for index, (part, name, shape_a, shape_b) in enumerate(lora_shapes(config, rank)):
        bound = (3 / shape_a[1]) ** 0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), shape_a, dtype, -bound, bound)
        layers.setdefault(part, {})[name] = {"a": a, "b": jnp.zeros(shape_b, dtype)}
    return {"vlm": {"layers": layers}}


def variables(module: EditReward, params: Mapping[str, Any]) -> dict[str, Any]:
    """What `module.apply` takes, of one tree {'vlm', 'head', and 'lora' where there is one}."""
    out: dict[str, Any] = {"params": {"vlm": params["vlm"], "head": params["head"]}}
    if "lora" not in params:
        return out
    return {**out, "lora": scaled(params["lora"], module.lora_alpha / rank_of(params["lora"]))}
