"""How a model is measured in the shapes world: what recipes evaluate and `launch.evaluate --suite=shapes` asks. Imports no network."""

from __future__ import annotations

from typing import Any

from unipic2_jax.shapes.world import IMAGE_SIZE

SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def evaluations(num_prompts: int, samples: int, num_steps: int = 20, guidance_scale: float = 1.0) -> dict[str, Any]:
    """Both tasks on held-out combinations with fixed seeds, without guidance: it would hide much of what there is to learn."""
    shared = {**SIZE, "num_prompts": num_prompts, "samples": samples, "num_steps": num_steps, "seed": 1000}
    return {
        task: {
            "source": {"kind": "shapes", "task": task, "split": "heldout"},
            "rewards": {f"shapes_{task}": {}},
            "guidance_scale": guidance_scale,
            "batch_size": 100,
            **shared,
        }
        for task in ("t2i", "edit")
    }
