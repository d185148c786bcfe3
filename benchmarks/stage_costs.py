"""What the full-size stages hold in memory and compute, counted from their recipes; nothing is allocated.

    python -m benchmarks.stage_costs

Printed is a Markdown table: trained and frozen parameters, their bytes with optimizer state, and the transformer's FLOPs.
Activations are not in it: they depend on the mesh and on how many parts a batch is computed in.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from absl import app
from ml_collections import ConfigDict

from configs import unipic2
from unipic2_jax.data.buckets import bucket_size
from unipic2_jax.flow.loss import flow_step_flops
from unipic2_jax.models.bundle import init_params, make_modules
from unipic2_jax.models.registry import SIZES, backbone_of
from unipic2_jax.models.sd3.flops import forward_flops
from unipic2_jax.optim.optimizer import split_params
from unipic2_jax.perf.blank_model import blank_tokenizers
from unipic2_jax.weights.precision import PRECISIONS

PRECISION = PRECISIONS["mixed"]
CONTEXT = {"sd35_medium": 77 + 256, "unipic2_metaquery": 256}  # tokens


def abstract_params(model: str) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, held as frozen ones are at full size."""
    sizes = SIZES[model]
    modules = make_modules(sizes.networks, blank_tokenizers(sizes.networks), sizes.settings, PRECISION)
    return jax.eval_shape(lambda key: PRECISION.hold(init_params(*modules, key)), jax.random.key(0))


def count(tree: Any) -> tuple[int, int]:
    """(parameters, bytes)."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size for leaf in leaves), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def step_flops(model: str, stage: ConfigDict, resolution: int) -> float:
    """The transformer's FLOPs of a step, the mean of the tasks, square pictures."""
    config = SIZES[model].networks["transformer"]
    height, width = bucket_size("1:1", resolution)
    tokens = height * width // (8 * config.patch_size) ** 2
    trained = bool(re.search(stage.optimizer.trainable, "transformer/x"))
    flops = [
        flow_step_flops(
            forward_flops(config, tokens, CONTEXT[model], tokens if task == "edit" else 0), stage.batch_size, trained
        )
        for task in stage.tasks
    ]
    return sum(flops) / len(flops)


def main(argv: list[str]) -> None:
    del argv
    config = unipic2.get_config()
    params = {name: abstract_params(name) for name in CONTEXT}
    print(
        "| stage | trained | frozen | weights, gradients, Adam, average | frozen weights | examples | PFLOPs a step | ZFLOPs in all |"
    )
    print("|---|---:|---:|---:|---:|---:|---|---:|")
    for name in ("connector", "kontext", "unified"):
        stage = config.stages[name]
        model = "sd35_medium" if stage.model == "text" else "unipic2_metaquery"
        never = backbone_of(SIZES[model].networks["transformer"]).never_trained
        trained, frozen = split_params(params[model], stage.optimizer.trainable, never)
        (many, size), (others, held) = count(jax.eval_shape(PRECISION.lift, trained)), count(frozen)
        starts = [part for part, _ in stage.resolutions] + [1.0]
        phases = [(resolution, step_flops(model, stage, resolution)) for _, resolution in stage.resolutions]
        total = sum(f * stage.steps * (end - start) for (_, f), start, end in zip(phases, starts, starts[1:]))
        each = ", ".join(f"{flops / 1e15:.2f} at {resolution}" for resolution, flops in phases)
        print(
            f"| {name} | {many / 1e9:.2f} B | {others / 1e9:.2f} B | {5 * size / 1e9:.1f} GB | "
            f"{held / 1e9:.1f} GB | {stage.steps * stage.batch_size / 1e6:.0f} M | {each} | {total / 1e21:.2f} |"
        )


if __name__ == "__main__":
    app.run(main)
