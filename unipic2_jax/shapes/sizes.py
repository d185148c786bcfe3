"""The sizes of the models that live in the shapes world, and their tokenizers."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from typing import Any

from unipic2_jax.models.config import ModelConfig
from unipic2_jax.models.family import ModelSizes
from unipic2_jax.models.metaquery.connector import ConnectorConfig, MetaQueryConfig
from unipic2_jax.models.qwen.decoder import Qwen2_5_VLConfig
from unipic2_jax.models.qwen.processor import VLMProcessor
from unipic2_jax.models.qwen.vision import Qwen2_5_VLVisionConfig
from unipic2_jax.models.registry import SIZES
from unipic2_jax.models.sd3.clip import CLIPTextConfig
from unipic2_jax.models.sd3.conditioner import load_tokenizers
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.models.sd3.t5 import T5Config
from unipic2_jax.models.sd3.vae import VAEConfig
from unipic2_jax.shapes.pool import WORDS
from unipic2_jax.shapes.questions import QUESTION_WORDS
from unipic2_jax.shapes.tokenizers import build_tokenizers
from unipic2_jax.shapes.vlm_processor import build_vlm_processor
from unipic2_jax.shapes.world import IMAGE_SIZE


def text_tokenizers(networks: Mapping[str, ModelConfig]) -> dict[str, Any]:
    """Those of three text encoders, for the words of the shapes world."""
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizers(WORDS, networks["text_encoder"].max_position_embeddings, folder)
        return load_tokenizers(folder)


def vlm_processor(networks: Mapping[str, ModelConfig]) -> VLMProcessor:
    """That of a vision-language model, for the words of the shapes world and of questions about it."""
    return build_vlm_processor((*WORDS, *QUESTION_WORDS), networks["vlm"], IMAGE_SIZE**2)


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
    "sd3",
    {
        "transformer": MMDiTConfig(
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
        "vae": VAEConfig(block_out_channels=(12, 24, 48, 64), layers_per_block=1, norm_num_groups=4, sample_size=48),
        "text_encoder": _TINY_CLIP,
        "text_encoder_2": dataclasses.replace(_TINY_CLIP, hidden_act="gelu"),
        "text_encoder_3": T5Config(vocab_size=116, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    },
    shift=5.0,
    settings={"max_sequence_length": 11, "edit_negative": ""},
    tokenizers=text_tokenizers,
)
SIZES.register("tiny")(TINY)

# UniPic2-Tiny with a vision-language model of its own instead of the text encoders. Vocabulary and special tokens are those of
# shapes/vlm_processor.py for the words of the shapes world.
TINY_METAQUERY = ModelSizes(
    "metaquery",
    {
        "transformer": TINY.networks["transformer"],
        "vae": TINY.networks["vae"],
        "conditioner": MetaQueryConfig(
            num_queries=16,
            llm_hidden_size=112,
            pooled_projection_dim=128,
            joint_attention_dim=128,
            connector_config=ConnectorConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
            ),
        ),
        "vlm": Qwen2_5_VLConfig(
            vocab_size=568,
            hidden_size=112,
            intermediate_size=176,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            # At Qwen's base of 1e6 so small a head would have next to no frequency left for columns; rows and time need few.
            rope_theta=1e4,
            mrope_section=(1, 2, 11),
            tie_word_embeddings=True,
            bos_token_id=561,
            eos_token_id=563,
            vision_start_token_id=564,
            vision_end_token_id=565,
            image_token_id=566,
            video_token_id=567,
            # 48 x 48 pixels are 6 x 6 patches are 3 x 3 merged tokens, one for each cell.
            vision_config=Qwen2_5_VLVisionConfig(
                depth=4,
                hidden_size=80,
                intermediate_size=160,
                num_heads=4,
                patch_size=8,
                window_size=32,
                out_hidden_size=112,
                fullatt_block_indexes=(1, 3),
            ),
        ),
    },
    shift=TINY.shift,
    settings={"vision_scale": 1.0, "max_sequence_length": 32, "edit_negative": ""},
    tokenizers=vlm_processor,
)
SIZES.register("tiny_metaquery")(TINY_METAQUERY)
