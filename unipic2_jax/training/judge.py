"""A reward that is a Qwen2.5-VL, as EditReward is, without its weights: what one judgement of all samples costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from PIL import Image

from unipic2_jax.data.blank import PROMPT
from unipic2_jax.models.qwen import QWEN2_5_VL_7B, Qwen2_5_VL, Qwen2_5_VLConfig, example_inputs
from unipic2_jax.parallel.mesh import described_rows
from unipic2_jax.parallel.rules import described
from unipic2_jax.pipelines.blank import BlankProcessor
from unipic2_jax.pipelines.vlm import VLMInput, user_message
from unipic2_jax.training.stage import Program


def judge_program(
    mesh: Mesh, samples: int, height: int, width: int, config: Qwen2_5_VLConfig = QWEN2_5_VL_7B
) -> Program:
    """Source, edited picture (pixels) and instruction of every sample -> a score [B], from the last hidden state, in bfloat16."""
    model = Qwen2_5_VL(config, jnp.bfloat16, jnp.bfloat16)

    def new(key: jax.Array) -> dict[str, Any]:
        params = model.init(key, *example_inputs(config))["params"]
        return {"vlm": params, "head": jnp.zeros((config.hidden_size, 1), jnp.bfloat16)}

    def judge(params: dict[str, Any], given: VLMInput) -> jax.Array:
        positions = given.positions.transpose(1, 0, 2)
        hidden = model.apply({"params": params["vlm"]}, given.input_ids, positions, given.valid, given.vision)
        return (hidden[:, -1] @ params["head"])[:, 0]

    params = described(mesh, jax.eval_shape(new, jax.eval_shape(lambda: jax.random.key(0))))
    pictures = [Image.new("RGB", (width, height))] * 2
    given = BlankProcessor(config)([[user_message(pictures, PROMPT)]])
    rows = described_rows(given, samples, mesh)
    return Program("reward (a Qwen2.5-VL)", jax.jit(judge), (params, rows), {}, 0.0, ("parameters", "batch"))
