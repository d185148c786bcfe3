"""EditReward without its weights: what one judgement of all samples costs."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image

from unipic2_jax.models.edit_reward.model import WORDS, Spec, apply
from unipic2_jax.models.edit_reward.network import EditReward
from unipic2_jax.models.qwen.decoder import QWEN2_5_VL_7B, Qwen2_5_VLConfig, example_inputs
from unipic2_jax.parallel.mesh import described_rows
from unipic2_jax.parallel.rules import described
from unipic2_jax.perf.blank_data import PROMPT
from unipic2_jax.perf.blank_model import BlankProcessor
from unipic2_jax.training.stage import Program
from unipic2_jax.weights.precision import Precision


def edit_reward_program(
    mesh: Mesh,
    samples: int,
    height: int,
    width: int,
    precision: Precision,
    config: Qwen2_5_VLConfig = QWEN2_5_VL_7B,
) -> Program:
    """Source, edited picture (pixels) and instruction of every sample -> scores [B, targets]."""
    model = EditReward(config, dtype=precision.compute, param_dtype=precision.trained)

    def new(key: jax.Array) -> dict[str, Any]:
        made = model.init(key, *example_inputs(config))["params"]
        seen = {name: tree for name, tree in made["vlm"].items() if name != WORDS}
        return {**made, "vlm": precision.hold(seen)}

    params: Any = described(mesh, jax.eval_shape(new, jax.eval_shape(lambda: jax.random.key(0))))
    pictures = [Image.new("RGB", (width, height))] * 2
    given = BlankProcessor(config)([Spec().question(*pictures, PROMPT)])
    rows = described_rows(given, samples, mesh)
    judge = jax.jit(lambda params, given: apply(model, params, given))
    return Program("reward (a Qwen2.5-VL)", judge, (params, rows), {}, 0.0, ("parameters", "batch"))
