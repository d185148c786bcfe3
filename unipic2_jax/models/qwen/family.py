"""Qwen2.5-VL: a network of its own, which models of several families read prompts with."""

from __future__ import annotations

from unipic2_jax.models.family import Network
from unipic2_jax.models.qwen import names
from unipic2_jax.models.qwen.decoder import Qwen2_5_VL, Qwen2_5_VLConfig, example_inputs
from unipic2_jax.models.registry import NETWORKS
from unipic2_jax.parallel.rules import PARAMETER_ROWS

NETWORKS.register(Qwen2_5_VLConfig.CLASS_NAME)(
    Network(Qwen2_5_VLConfig, Qwen2_5_VL, names.rules, example_inputs, library="transformers")
)

# LoRA of the decoder, see models/edit_reward/network.py.
PARAMETER_ROWS.register("qwen")(
    (
        (r"/([qkv]_proj|gate_proj|up_proj)/a$", ("embed", None)),
        (r"/([qkv]_proj|gate_proj|up_proj)/b$", (None, "heads")),
        (r"/(o_proj|down_proj)/a$", ("heads", None)),
        (r"/(o_proj|down_proj)/b$", (None, "embed")),
    )
)
