"""A process that imports all of a library without the shapes world, looks every registry up, and makes and loads a model.

It prints what the registries hold, as JSON; its argument is the folder that the model is written to.
"""

import dataclasses
import importlib
import json
import pkgutil
import sys

import jax
import numpy as np

import unipic2_jax
from unipic2_jax.core.assets import TINY
from unipic2_jax.core.registry import Registry
from unipic2_jax.models.bundle import init_bundle, load_bundle, save_bundle
from unipic2_jax.models.registry import SIZES

CLIP = {
    "vocab_size": 653,
    "hidden_size": 16,
    "intermediate_size": 16,
    "projection_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 11,
    "bos_token_id": 651,
    "eos_token_id": 652,
    "pad_token_id": 652,
}
# What makes SD3.5-Medium small enough for a test that draws and writes all of it.
SMALL = {
    "transformer": {
        "sample_size": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 4,
        "dual_attention_layers": (0,),
    },
    "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32},
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "text_encoder_3": {"vocab_size": 116, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}


def import_everything():
    for module in pkgutil.walk_packages(unipic2_jax.__path__, "unipic2_jax."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name.startswith("unipic2_jax"):
                raise  # otherwise it is PyTorch or another library that only this module wants


def registries():
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("unipic2_jax.")]
    found = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Registry)}
    return {registry.what: sorted(registry) for registry in found.values()}


def make_and_load(folder):
    full = SIZES["sd35_medium"]
    networks = {name: dataclasses.replace(config, **SMALL[name]) for name, config in full.networks.items()}
    sizes = dataclasses.replace(full, networks=networks, settings={"max_sequence_length": 11})
    made = init_bundle(sizes, seed=3, tokenizers=TINY)
    loaded = load_bundle(save_bundle(made, folder))
    jax.tree.map(np.testing.assert_array_equal, made.params, loaded.params)
    tokens = loaded.conditioner.tokenize(["a red circle"])
    context, pooled = loaded.conditioner.apply(loaded.params["conditioner"], tokens)
    assert context.shape[-1] == pooled.shape[-1] == 32


if __name__ == "__main__":
    import_everything()
    found = registries()
    make_and_load(sys.argv[1])
    assert not [name for name in sys.modules if name.startswith("unipic2_jax.shapes")]
    print(json.dumps(found))
