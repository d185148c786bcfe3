"""The named sizes: one row a model, one column a network."""

from __future__ import annotations

import dataclasses

from unipic2_jax.models.clip import CLIP_BIGG, CLIP_L, CLIPTextConfig
from unipic2_jax.models.mmdit import MMDiTConfig
from unipic2_jax.models.t5 import T5Config
from unipic2_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The networks of one model, under the folder names of diffusers, and what the pipeline needs beside them.

    Attributes:
      shift: of the flow-matching schedule.
      max_sequence_length: T5 tokens in the context.
    """

    transformer: MMDiTConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig
    text_encoder_3: T5Config
    shift: float
    max_sequence_length: int


SD35_MEDIUM = ModelSizes(
    transformer=MMDiTConfig(),
    vae=VAEConfig(),
    text_encoder=CLIP_L,
    text_encoder_2=CLIP_BIGG,
    text_encoder_3=T5Config(),
    shift=3.0,
    max_sequence_length=256,
)

_TINY_CLIP = CLIPTextConfig(
    vocab_size=653,
    hidden_size=64,
    intermediate_size=256,
    projection_dim=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=11,
    bos_token_id=651,
    eos_token_id=652,
    pad_token_id=652,
)

# UniPic2-Tiny: 48 x 48 pixels are 6 x 6 latents are 9 tokens, one for each cell of the shapes world. The token (2 x 2 x 16 = 64
# numbers) stays narrower than the model, and the schedule's shift is larger than SD3.5's because so few latents decide about
# the prompt at high noise only.
TINY = ModelSizes(
    transformer=MMDiTConfig(
        sample_size=6,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=6,
        dual_attention_layers=(0, 1),
    ),
    vae=VAEConfig(block_out_channels=(12, 24, 48, 64), layers_per_block=1, norm_num_groups=4, sample_size=48),
    text_encoder=_TINY_CLIP,
    text_encoder_2=dataclasses.replace(_TINY_CLIP, hidden_act="gelu"),
    text_encoder_3=T5Config(vocab_size=116, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    shift=5.0,
    max_sequence_length=11,
)

SIZES = {"sd35_medium": SD35_MEDIUM, "tiny": TINY}
