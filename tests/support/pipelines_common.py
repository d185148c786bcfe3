"""A model small enough that a test compiles it in seconds, with weights that make every part of it matter."""

import dataclasses
import functools

import jax
import numpy as np

from unipic2_jax.models import bundle as bundles
from unipic2_jax.models.family import ModelSizes
from unipic2_jax.models.sd3.mmdit import MMDiTConfig
from unipic2_jax.models.sd3.t5 import T5Config
from unipic2_jax.models.sd3.vae import VAEConfig
from unipic2_jax.shapes.sizes import TINY
from unipic2_jax.shapes.sizes import text_tokenizers as shapes_tokenizers

CLIP = dataclasses.replace(TINY.networks["text_encoder"], hidden_size=16, intermediate_size=32, projection_dim=16)
SIZES = ModelSizes(
    "sd3",
    {
        "transformer": MMDiTConfig(
            sample_size=6,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
        ),
        # Three levels: an f4 VAE, so that a patch is 8 pixels.
        "vae": VAEConfig(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=24),
        "text_encoder": CLIP,
        "text_encoder_2": dataclasses.replace(CLIP, hidden_act="gelu"),
        "text_encoder_3": T5Config(
            vocab_size=TINY.networks["text_encoder_3"].vocab_size,
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=4,
        ),
    },
    shift=3.0,
    settings={"max_sequence_length": 12},
    tokenizers=shapes_tokenizers,
)


@functools.cache
def text_tokenizers():
    """Those of the shapes world."""
    return shapes_tokenizers(SIZES.networks)


def small_bundle(sizes=SIZES, seed=0, tokenizers=None):
    """Drawn with numpy: compiling the initialisers would cost more than the tests. No parameter is left at zero, as the
    output layer's and the modulations' are at first, because nothing would reach the picture then."""
    modules = bundles.make_modules(sizes.networks, tokenizers or text_tokenizers(), sizes.settings, np.dtype("float32"))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "scale":
            return 1 + np.float32(0.1) * noise
        if name == "pos_embed":
            return np.float32(0.5) * noise
        fan_in = np.prod(leaf.shape[-4:-1]) if name == "kernel" else 25
        return (noise / np.sqrt(fan_in)).astype(np.float32)

    abstract = jax.eval_shape(lambda key: bundles.init_params(*modules, key), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, abstract)
    scheduler = bundles.FlowMatchConfig(shift=sizes.shift)
    return bundles.Bundle(*modules, scheduler, params)
